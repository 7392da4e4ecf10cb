"""The tiny text encoder: a byte-level BPE tokenizer and a CLIP text model trained against rendered motion.

The text model learns with CLIP's symmetric contrastive loss (arXiv 2103.00020) beside a small convolutional tower that
sees a few frames and their differences. The tower is thrown away; only the text side ships.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cinemo.media.synthetic import render_scene
from cinemo.types import keyed_generator, keyed_seed

MAX_TOKENS = 32
MERGES = 1000
VIEW = (32, 48)
VIEW_FRAMES = (20, 60, 100, 140)  # far enough apart to see a slow one move
TEMPERATURE = 0.07
# A base of everyday words, so that prompts about other things than rendered clips split into few pieces.
EVERYDAY = """
a an the and or of in on at to from with without by for over under above below behind before after into onto through
across along around near beside between against towards away up down left right top bottom front back middle centre
one two three four five many few some several all no not very slowly quickly gently softly fast slow calm wild steady
small large big tiny huge long short tall wide narrow old young new bright dark light warm cold hot wet dry soft hard
red orange yellow green blue purple pink brown black white grey golden silver colourful man woman person people child
girl boy face hand hair eye head body crowd dancer runner rider driver player dog cat horse bird fish cow sheep bear
lion tiger rabbit butterfly bee duck swan eagle elephant tree leaf flower grass forest mountain hill valley river lake
sea ocean wave water rain snow ice cloud sky sun moon star fire smoke flame candle firework wind storm lightning fog
mist sand desert beach rock stone field garden road street city town house building bridge window door wall room table
chair bottle cup book lamp car bus train truck boat ship plane bicycle balloon kite ball wheel flag robot machine
clock walk run jump dance ride drive fly swim float drift move turn spin rotate fall rise climb swing shake wave smile
laugh talk sing play eat drink cook open close look watch blink stand sit lie sleep burn melt grow bloom flow stream
pour splash flicker shine glow fade blow rock slide roll bounce push pull throw catch lift zoom pan tilt hold stay
still camera view scene shot video picture photo image portrait landscape background foreground close motion slow time
lapse morning evening night day sunset sunrise summer winter autumn spring style painting cartoon film quality
detailed
"""
ENDINGS = ("", "s", "ing", "ed")

Log = Callable[[str], None]


@dataclass(frozen=True)
class MotionPairs:
    """``views_NCHW``: uint8, four small RGB frames stacked in channels. ``captions``: one each."""

    views_NCHW: np.ndarray
    captions: tuple[str, ...]


def rendered_pairs(count: int, seed: int) -> MotionPairs:
    scenes = [render_scene(seed, index, VIEW) for index in range(count)]
    views = np.stack([scene.frames(VIEW_FRAMES) for scene in scenes])
    channels = views.transpose(0, 1, 4, 2, 3).reshape(count, 3 * len(VIEW_FRAMES), *VIEW)
    return MotionPairs(channels, tuple(scene.caption for scene in scenes))


def make_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with a small vocabulary; every byte has a token, so that any text can be written."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=MERGES + 2 * len(alphabet),
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    words = EVERYDAY.split()
    inflected = [word + ending for word in words for ending in ENDINGS]
    learner.train_from_iterator([*captions, *(words * 20), *inflected], trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:MERGES]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def train_text(minutes: float, seed: int, log: Log, pairs: int = 6000) -> tuple[CLIPTokenizer, CLIPTextModel, float]:
    """Train within ``minutes`` after rendering; returns tokenizer, text model and held-out top-1 of 64 retrieval."""
    torch.manual_seed(keyed_seed(seed, "text"))
    train, held_out = (
        rendered_pairs(pairs, keyed_seed(seed, "text train")),
        rendered_pairs(512, keyed_seed(seed, "text held out")),
    )
    tokenizer = make_tokenizer(train.captions)
    ends: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=64,
            **ends,
        )
    )
    tower = _MotionTower()
    ids, held_ids = _ids(tokenizer, train.captions), _ids(tokenizer, held_out.captions)
    optimizer = torch.optim.AdamW([*text.parameters(), *tower.parameters()], lr=2e-3, weight_decay=0.02)
    generator = keyed_generator(seed, "text", "batches")
    started = time.monotonic()
    step = 0
    while (spent := (time.monotonic() - started) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * spent))
        picked = torch.randint(len(ids), (128,), generator=generator)
        loss = _contrast(_embed(text, ids[picked]), tower(_view(train, picked)), ids[picked])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            score = _retrieval(text, tower, held_out, held_ids)
            log(f"text: step {step}, loss {loss.item():.3f}, held-out top-1 of 64 {score:.3f}")
    text.eval()
    score = _retrieval(text, tower, held_out, held_ids)
    log(f"text: step {step}, held-out top-1 of 64 {score:.3f} (chance {1 / 64:.3f})")
    return tokenizer, text, score


class _MotionTower(nn.Module):
    """Frames and their differences to a unit vector of the text model's width."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6 * len(VIEW_FRAMES) - 3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1] * (VIEW[0] // 16) * (VIEW[1] // 16), 64)

    def forward(self, views_BCHW: Tensor) -> Tensor:
        changes = 4 * (views_BCHW[:, 3:] - views_BCHW[:, :-3])
        hidden = self.features(torch.cat([views_BCHW, changes], 1))
        return F.normalize(self.out(hidden.flatten(1)), dim=-1)


def _view(pairs: MotionPairs, picked: Tensor) -> Tensor:
    return torch.from_numpy(pairs.views_NCHW[picked.numpy()]).float() / 127.5 - 1


def _ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    made = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = made.input_ids
    return ids


def _embed(text: CLIPTextModel, ids_BL: Tensor) -> Tensor:
    # Without projection: what is learned stays in the states that cross-attention reads.
    return F.normalize(text(ids_BL).pooler_output, dim=-1)


def _contrast(words_BD: Tensor, views_BD: Tensor, ids_BL: Tensor) -> Tensor:
    """Symmetric cross entropy; pairs with the same caption are not counted against each other."""
    logits = words_BD @ views_BD.T / TEMPERATURE
    same = (ids_BL[:, None] == ids_BL[None]).all(-1) & ~torch.eye(len(ids_BL), dtype=torch.bool)
    logits = logits.masked_fill(same, -1e4)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def _retrieval(text: CLIPTextModel, tower: nn.Module, pairs: MotionPairs, ids: Tensor, pool: int = 64) -> float:
    """Share of captions whose own clip is the nearest of ``pool`` unseen clips."""
    hits = 0
    for start in range(0, len(ids), pool):
        picked = torch.arange(start, start + pool)
        nearest = (_embed(text, ids[picked]) @ tower(_view(pairs, picked)).T).argmax(1)
        hits += int((nearest == torch.arange(pool)).sum())
    return hits / len(ids)
