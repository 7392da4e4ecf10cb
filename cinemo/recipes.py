"""Named runs: one function per recipe, each returning a complete `Recipe`; and recipes from files and assignments.

Methods are imported late: the names of recipes, for bad flags, need no torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cinemo import storage
from cinemo.config import DataConfig, DiffusionConfig, EncodersConfig, Recipe, keys
from cinemo.types import InputError

DEFAULT_RECIPE = "cinemo-tiny"
DEFAULT_METHOD = "cinemo"  # of recipe files that name none


def cinemo_320x512() -> Recipe:
    """The paper (arXiv 2407.15642): 8 workers, global batch 80, 16 frames at interval 3-10, 320x512.

    Every key, by where its value is from (a test holds this list complete):

    - Section 4.1. data.frames: 16, so 15 residuals. data.size, data.frame_interval. train.workers: 8, with one GPU each
      (train.gpus_per_worker). train.global_batch: 80; train.micro_batch: 10 of them on each GPU. train.prompt_dropout:
      0.5; train.image_dropout, train.motion_dropout: only prompts are dropped. train.weight_decay: Adam, with the
      train.betas of its own paper (arXiv 1412.6980). sample.solver: DDIM. sample.steps: 50. sample.guidance_scale: 7.5,
      in every step (sample.guidance_interval, sample.reuse_features), as it is (sample.guidance_rescale).
    - Section 3. train.init: LaVie's base weights; train.trainable: all parameters (3.1). data.bucket_edges: SSIM cut
      uniformly into buckets 0..19 (3.2). diffusion.prediction: the noise (equation 3), with equal weights
      (train.min_snr_gamma), on the schedule as it is (diffusion.zero_terminal_snr, diffusion.dynamic_rescale).
      train.noise_offset: none (Algorithm 1, line 7). train.timestep_shift, train.timestep_shift_steps: none (line 6).
      diffusion.data_scale: 1 (line 5). sample.dct_init (3.3).
    - Stable Diffusion v1.4, which LaVie (arXiv 2309.15103) is built on, and so the published code and weights.
      encoders.vae, encoders.text_encoder, encoders.tokenizer. encoders.normalize: off, one published factor scales all
      channels (encoders.latents_mean, encoders.latents_std: none). model.in_channels, model.out_channels,
      model.block_out_channels, model.layers_per_block, model.norm_num_groups, model.cross_attention_dim,
      model.attention_head_dim.
    - The published code, where the paper is silent. model.addition_time_embed_dim: 256. diffusion.train_steps,
      diffusion.beta_start, diffusion.beta_end, diffusion.beta_schedule: LaVie's, not Stable Diffusion's.
      encoders.vae_decoder: SVD's temporal one. encoders.latent: a sample of the posterior. sample.dct_tau: 975.
      sample.dct_keep: 0.23. sample.dct_mode: rows and columns, where the paper says 3D. sample.fps: 8.
      sample.spacing, sample.final_level, sample.eta: diffusers' "leading" from 981, ending at a_0, without fresh noise.
      sample.edit_guidance_scale: 1, where the paper says 7.5. sample.edit_dct_tau: 985.
    - Our choice, what is learnt. train.lr: 1e-4 (DynamiCrafter, arXiv 2310.12190, begins with it), constant
      (train.schedule, train.warmup_steps). train.max_steps: 100 000, where the paper says one week. train.grad_clip: 1.
      train.ema_decay: no average. train.precision: bf16. data.ssim: of luma. data.views: one a clip.
      sample.motion_bucket: the middle.
    - Our choice, how it is computed. train.gradient_checkpointing: ten samples hold 71 GB of activations in bf16
      without it, 14 GB with it. train.zero_stage, train.offload, train.cpus_per_worker, train.lanes, train.on_damaged,
      train.cache_gb, train.max_failures, ``compile``. train.seed, data.seed. train.log_every, train.checkpoint_every,
      train.keep_checkpoints, train.sample_every, train.sample_count, train.held_out_shards, train.validate_every,
      train.canary. data.clips_per_shard, data.decoder, data.clip_timeout, data.clip_memory, data.decode_cpus,
      data.decode_resource, data.max_quarantine_share, data.encode_batch, data.encode_actors, data.encode_gpus.
    - Not used here. train.lora_rank, train.lora_alpha, train.lora_layers, data.fields, encoders.image_encoder.
    """
    from cinemo.methods.cinemo import CinemoRecipe, CinemoTrain

    return CinemoRecipe(
        name="cinemo-320x512",
        data=DataConfig(encode_gpus=1.0),
        encoders=EncodersConfig(
            vae="models/sd-v1-4/vae",
            vae_decoder="models/cinemo/vae_temporal_decoder",
            text_encoder="models/sd-v1-4/text_encoder",
            tokenizer="models/sd-v1-4/tokenizer",
        ),
        train=CinemoTrain(gpus_per_worker=1, gradient_checkpointing=True, init="models/lavie_base.pt"),
    )


# Between the buckets of rendered clips (`cinemo.media.synthetic`): at equal distances in sqrt(1 - SSIM), which grows
# as displacement does, up to what one clip in fifty exceeds. What stands still is in bucket 0.
RENDERED_EDGES = tuple(round(1 - (0.0083 * k) ** 2, 6) for k in range(19, 0, -1))


def cinemo_tiny() -> Recipe:
    """The default: the same method with small networks at 64x96 pixels, for two CPU cores.

    It starts from a base UNet that ships with the package (``--set train.init=null``: from nothing). Where it departs
    from the paper, and why (`cinemo/assets/tiny/CARD.md` has the figures):

    - diffusion.prediction: v (arXiv 2202.00512). At the noisy end of the schedule an epsilon error of 0.1 is one of 13
      in the residuals, which minutes of training leave in every video.
    - diffusion.data_scale, and channels of unit deviation (the autoencoder's ``latents_mean`` and ``latents_std``):
      residuals of deviation 0.4 drown in noise of 1 from step 111 on, and small channels before that.
    - train.timestep_shift 4 and train.prompt_dropout 0.1: with uniform timesteps and half of the prompts dropped, no
      direction is learnt in such a time. It is decided near pure noise, and by the prompt.
    - data.bucket_edges: those that rendered clips fill. encoders.latent: the posterior's mode.
    - sample.guidance_scale 3: without it the direction is right and the motion two thirds as fast as it should be.
    """
    from cinemo.methods.cinemo import CinemoRecipe, CinemoSample, CinemoTrain
    from cinemo.networks.lavie_unet import UNetConfig

    return CinemoRecipe(
        name="cinemo-tiny",
        data=DataConfig(size=(64, 96), clips_per_shard=16, bucket_edges=RENDERED_EDGES),
        encoders=EncodersConfig(latent="mode"),
        model=UNetConfig(
            in_channels=16,
            out_channels=16,
            block_out_channels=(64, 128),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=64,
            attention_head_dim=1,
            addition_time_embed_dim=64,
        ),
        diffusion=DiffusionConfig(prediction="v", data_scale=2.44),
        train=CinemoTrain(
            workers=2,
            global_batch=8,
            micro_batch=4,
            max_steps=300,
            lr=2e-4,
            warmup_steps=20,
            schedule="cosine",
            prompt_dropout=0.1,
            timestep_shift=4.0,
            precision="fp32",
            init="package:tiny/unet",
            lanes=2,
            log_every=5,
            checkpoint_every=100,
            sample_every=100,
        ),
        sample=CinemoSample(steps=25, guidance_scale=3.0),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"cinemo-320x512": cinemo_320x512, "cinemo-tiny": cinemo_tiny}


def load_recipe(name_or_file: str, assignments: Sequence[str] = ()) -> Recipe:
    """A named recipe, or one read from a JSON file (local or s3://), with ``--set`` assignments applied.

    Raises:
        InputError: an unknown name, an unreadable file, an unknown key or a value out of range.
    """
    if name_or_file in RECIPES:
        recipe = RECIPES[name_or_file]()
    elif name_or_file.endswith(".json"):
        try:
            values = json.loads(storage.read_bytes(name_or_file))
        except FileNotFoundError:
            raise InputError(f"recipe {name_or_file}: no such file") from None
        except ValueError as error:
            raise InputError(f"recipe {name_or_file}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"recipe {name_or_file}: expected a JSON object, got {type(values).__name__}")
        recipe = parse_recipe(values, f"recipe {name_or_file}")
    else:
        raise InputError(f"recipe {name_or_file!r}: unknown name; expected one of {', '.join(RECIPES)} or a .json file")
    return override(recipe, assignments)


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """A recipe of its method's own type; every fault becomes one `InputError` line that names the dotted key."""
    from cinemo.methods import method_named

    if not isinstance(values, Mapping):
        raise InputError(f"{source}: got a {type(values).__name__}, expected a JSON object")
    name = values.get("method", DEFAULT_METHOD)
    if not isinstance(name, str):
        raise InputError(f"{source}: method is {name!r}, expected the name of a method")
    try:
        kind = method_named(name).recipe_type
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    try:
        return kind.model_validate({**values, "method": name})
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"])) or "recipe"
            got = "" if fault["type"] in ("missing", "value_error") else f" (got {fault['input']!r})"
            hint = _near(key, kind, name) if fault["type"] == "extra_forbidden" else ""
            faults.append(f"{key}: {fault['msg']}{got}{hint}")
        raise InputError(f"{source}: " + "; ".join(faults)) from None


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Apply ``dotted.key=value`` assignments; the value is JSON, or a plain string where it is not JSON."""
    values = recipe.model_dump(mode="json")
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: expected dotted.key=value, for example train.lr=1e-4")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node = values
        *path, leaf = key.strip().split(".")
        for name in path:
            child = node.get(name)
            node = child if isinstance(child, dict) else {}
        if leaf not in node:
            raise InputError(f"--set {assignment}: unknown key {key!r}{_near(key, type(recipe), recipe.method)}")
        node[leaf] = value
    return parse_recipe(values, "--set " + " ".join(assignments) if assignments else recipe.name)


def _near(key: str, kind: type[Recipe], method: str) -> str:
    """What was perhaps meant; or which keys this part of a recipe of this method has."""
    leaf, every = key.rsplit(".", 1)[-1], keys(kind)
    close = difflib.get_close_matches(key, every, 1, 0.75) or [k for k in every if k.rsplit(".", 1)[-1] == leaf][:1]
    if close:
        return f"; did you mean {close[0]}?"
    part = key.rpartition(".")[0]
    beside = [k.rpartition(".")[2] for k in every if k.rpartition(".")[0] == part]
    return f"; {part} of method {method} has {', '.join(beside)}" if beside and part else ""
