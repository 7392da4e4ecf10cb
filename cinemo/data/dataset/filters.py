"""Which samples a training sees: an expression over what is stored of each of them, such as
``ssim < 0.98 and aesthetic > 4.5 and "dog" in caption``.

The text is Python's syntax with SQL's words (``AND``, ``=``, ``<>``, ``IS NULL``) beside Python's. It is parsed, never
run: comparisons, ``and``, ``or``, ``not``, ``in``, arithmetic, numbers, texts and columns are all there is, and what is
compared with null is left out.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import keyword
import operator
import re
import tokenize
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from cinemo import cache, storage
from cinemo.data.dataset import columns
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.types import InputError

_READERS = 32
_SHOWN = 300  # characters of an expression in a message
_PARTS = 500  # of an expression; Arrow's stack overflows, and ends the process, at some thousands
_WORDS = {"and": "and", "or": "or", "not": "not", "in": "in", "is": "is", "null": "None", "true": "True"}
_WORDS |= {"false": "False", "=": "==", "<>": "!="}
_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_EXAMPLE = "such as \"ssim < 0.98 and aesthetic > 4.5 and 'dog' in caption\""


def select(index: DatasetIndex, where: str) -> np.ndarray:
    """Whether each sample of a dataset passes (bool), in the index's order. The answer is kept in the cache directory.

    Raises:
        InputError: no such column, no expression, types that cannot be compared, or nothing passes.
    """
    expression, names = parse(where)
    checksums = index.table["checksum"].to_pylist()
    key = hashlib.sha256("\n".join([index.uri, where, *checksums]).encode()).hexdigest()[:32]
    kept = cache.cache_directory() / "filters" / f"{key}.npy"
    count = int(index.samples_of_shards.sum())
    with contextlib.suppress(OSError, ValueError):  # a cache that cannot be read costs time
        return np.unpackbits(np.load(kept, allow_pickle=False), count=count).astype(bool)
    table = _columns(index, names, where)
    try:
        passed = pyarrow.dataset.dataset(table).to_table(columns={"passed": expression})["passed"]
        found = np.asarray(pc.fill_null(passed.cast(pa.bool_()), False), bool)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        kinds = ", ".join(f"{name} is {table.schema.field(name).type}" for name in names)
        reason = str(error).splitlines()[0]
        raise InputError(f"{_said(where)}: cannot be computed ({kinds}): {reason}") from None
    if not found.any():
        raise InputError(f"{_said(where)}: none of the {count} samples of {index.uri} passes")
    with contextlib.suppress(OSError):
        sink = io.BytesIO()
        np.save(sink, np.packbits(found))
        storage.write_bytes(str(kept), sink.getvalue())
    return found


def parse(where: str) -> tuple[pc.Expression, list[str]]:
    """The expression of a text, and the columns that it names.

    Raises:
        InputError: it is none.
    """
    names: list[str] = []
    try:
        tree = ast.parse(_pythonic(where), mode="eval").body
        parts = sum(_size(node) for node in ast.walk(tree))
        if parts > _PARTS:
            raise _NotAllowed(f"it has {parts} parts, expected at most {_PARTS} (any number of texts behind 'in')")
        expression = _expression(tree, names)
        if not names:
            raise _NotAllowed("it names no column")
        return expression, list(dict.fromkeys(names))
    except (
        SyntaxError,
        tokenize.TokenError,
        RecursionError,
        MemoryError,
        UnicodeError,
        _NotAllowed,
        TypeError,
    ) as error:
        # Python's parser calls what nests too deep for it a lack of memory.
        reason = f": {error}" if isinstance(error, _NotAllowed) else ""
        raise InputError(f"{_said(where)}: not an expression over columns{reason}; expected one {_EXAMPLE}") from None


class _NotAllowed(Exception):
    """A part of Python that filters do not have."""


def _said(where: str) -> str:
    """The flag and its expression for a message, which stays one readable line."""
    return f"--where {where if len(where) <= _SHOWN else where[:_SHOWN] + '...'!r}"


def _size(node: ast.AST) -> int:
    """How many operations Arrow nests for a part of an expression, without the parts in it."""
    match node:
        case ast.BoolOp():
            return len(node.values) - 1
        case ast.Compare():
            return len(node.ops)
        case ast.BinOp() | ast.UnaryOp():
            return 1
        case ast.Tuple() | ast.List():
            return sum(not (isinstance(value, ast.Constant) and isinstance(value.value, str)) for value in node.elts)
    return 0


def _scalar(value: Any) -> pc.Expression:
    try:
        return pc.scalar(value)
    except (OverflowError, UnicodeEncodeError):
        raise _NotAllowed(
            f"{_said(str(value))[8:]} is no number of 64 bits and no text that a column can hold"
        ) from None


def _pythonic(where: str) -> str:
    """With Python's words for SQL's; what stands in quotes stays. A column in backticks may have any name."""
    quoted: list[str] = []

    def named(match: re.Match[str]) -> str:
        quoted.append(match[1])
        return f"__column_{len(quoted) - 1}__"

    pieces = re.split(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", where)
    pieces[::2] = [re.sub(r"`([^`]+)`", named, piece).replace("<>", "!=") for piece in pieces[::2]]
    tokens = []
    for kind, text, *_ in tokenize.generate_tokens(io.StringIO("".join(pieces)).readline):
        if kind in (tokenize.NAME, tokenize.OP):
            text = _WORDS.get(text.lower(), text)
            found = re.fullmatch(r"__column_(\d{1,9})__", text)
            text = f"__column__({quoted[int(found[1])]!r})" if found and int(found[1]) < len(quoted) else text
            if kind == tokenize.NAME and keyword.iskeyword(text) and text not in _WORDS.values():
                raise _NotAllowed(f"{text!r} is a word of Python; write `{text}` for a column of that name")
        if kind not in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            tokens.append(text)
    return " ".join(tokens).strip()


def _expression(node: ast.AST, names: list[str]) -> pc.Expression:
    def of(part: ast.AST) -> pc.Expression:
        return _expression(part, names)

    match node:
        case ast.BoolOp():
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return reduce(join, map(of, node.values))
        case ast.UnaryOp(op=ast.Not()):
            return ~of(node.operand)
        case ast.UnaryOp(op=ast.USub()):
            return pc.scalar(0) - of(node.operand)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        case ast.Compare():
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return reduce(operator.and_, (_comparison(left, op, right, names) for left, op, right in pairs))
        case ast.Name() | ast.Call():
            name = _column_name(node)
            names.append(name)
            return pc.field(name)
        case ast.Constant() if isinstance(node.value, str | int | float):
            return _scalar(node.value)
    raise _NotAllowed(f"{ast.unparse(node)!r} is not allowed")


def _column_name(node: ast.Name | ast.Call) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Name(id="__column__"), args=[ast.Constant(value=str(name))]):
            return name
    raise _NotAllowed(f"{ast.unparse(node)!r} is not allowed")


def _comparison(left: ast.AST, op: ast.cmpop, right: ast.AST, names: list[str]) -> pc.Expression:
    if isinstance(op, ast.Is | ast.IsNot):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise _NotAllowed("after 'is' only null can stand")
        missing = _expression(left, names).is_null()
        return ~missing if isinstance(op, ast.IsNot) else missing
    if isinstance(op, ast.In | ast.NotIn):
        if isinstance(right, ast.Tuple | ast.List):
            try:
                values = ast.literal_eval(right)
            except ValueError:  # names or calls are in there
                values = ()
            if not values or any(not isinstance(value, str | int | float) for value in values):
                raise _NotAllowed("behind 'in', expected numbers or texts in parentheses")
            column = _expression(left, names)
            if all(isinstance(value, str) for value in values):
                found = pc.if_else(column.is_valid(), column.isin(list(values)), pa.scalar(None, pa.bool_()))
            else:
                found = reduce(operator.or_, (column == _scalar(value) for value in values))
        elif isinstance(left, ast.Constant) and isinstance(left.value, str):
            found = pc.match_substring(_expression(right, names), left.value)
        else:
            raise _NotAllowed("'in' is for a column and values in parentheses, or for a text and a column")
        return ~found if isinstance(op, ast.NotIn) else found
    return _OPERATORS[type(op)](_expression(left, names), _expression(right, names))


def _columns(index: DatasetIndex, names: list[str], where: str) -> pa.Table:
    """Some columns of all samples; each of a type that holds all that shards have there, null where one lacks it."""
    shards = zip(index.shards, index.table["checksum"].to_pylist(), strict=True)
    known: set[str] = set()

    def read(shard: tuple[int, str]) -> dict[str, pa.ChunkedArray]:
        table = columns.read(index.uri, *shard).samples
        known.update(table.column_names)
        return {name: table[name] if name in table.column_names else pa.nulls(len(table)) for name in names}

    with ThreadPoolExecutor(_READERS if storage.is_remote(index.uri) else 4) as pool:
        parts = list(pool.map(read, shards))
    if absent := [name for name in names if name not in known]:
        there = ", ".join(sorted(known - {"start", "end"}))
        raise InputError(f"{_said(where)}: no column {', '.join(absent)} in {index.uri}; it has {there}")
    return pa.table({name: pa.chunked_array(_alike([part[name] for part in parts])) for name in names})


def _alike(pieces: list[Any]) -> Iterator[pa.Array]:
    kinds = {piece.type for piece in pieces} - {pa.null()}
    numbers = {pa.int64(), pa.float64()}
    kind = kinds.pop() if len(kinds) == 1 else pa.float64() if kinds and kinds <= numbers else pa.string()
    for piece in pieces:
        cast = piece.cast(kind)
        yield from cast.chunks if isinstance(cast, pa.ChunkedArray) else [cast]
