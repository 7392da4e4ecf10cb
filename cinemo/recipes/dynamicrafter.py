"""The named runs of DynamiCrafter (arXiv 2310.12190) and of its published models."""

from __future__ import annotations

from typing import Any, TypeVar

from cinemo.config import DataConfig, DiffusionConfig, EncodersConfig
from cinemo.methods.dynamicrafter import (
    DynamiCrafterModel,
    DynamiCrafterRecipe,
    DynamiCrafterSample,
    DynamiCrafterTrain,
)
from cinemo.methods.dynamicrafter_stills import StillsRecipe
from cinemo.methods.interpolation import InterpolationRecipe
from cinemo.networks.dynamicrafter_unet import DynamiCrafterConfig
from cinemo.networks.resampler import ResamplerConfig
from cinemo.recipes.cinemo import RENDERED_EDGES

Run = TypeVar("Run", bound=DynamiCrafterRecipe)

# Stable Diffusion 2.1's, whose text tower ends with the layer that is used, and OpenCLIP's ViT-H/14 image tower.
ENCODERS = EncodersConfig(
    vae="models/sd-2-1/vae",
    text_encoder="models/sd-2-1/text_encoder",
    tokenizer="models/sd-2-1/tokenizer",
    image_encoder="models/clip-vit-h-14",
)


# Samples that an A100 with 80 GB holds at once without computing anything twice, by height and width, of at most 8.
_AT_ONCE = {(256, 256): 8, (320, 512): 4, (512, 512): 8, (576, 1024): 1}  # stage 1 has 512x512, of a single frame


def dynamicrafter_256() -> DynamiCrafterRecipe:
    """The paper's model: stage 3 of its training, at 256x256.

    Every key, by where its value is from (a test holds this list complete):

    - Section 4.1. data.frames: 16. data.size: 256x256. train.global_batch: 64. train.lr: 5e-5 (the sentence can also be
      read so that only this stage has it). train.max_steps: 100 000. train.trainable: the query transformer and the
      spatial layers. train.condition_frame: drawn from the clip's own. sample.solver, sample.steps: DDIM, 50.
      sample.guidance_scale: 7.5, of picture and text together (sample.image_guidance_scale), in every step
      (sample.guidance_interval, sample.reuse_features).
    - Section 3. train.init: the text-to-video model of VideoCrafter, as stage 2 left it. model.unet.in_channels: noisy
      latents and the picture's. model.resampler.num_queries, model.resampler.video_length: queries for every frame.
      diffusion.prediction: the noise, with equal weights (train.min_snr_gamma).
    - The published code and weights, where the paper is silent or they differ. model.unet.out_channels,
      model.unet.model_channels, model.unet.attention_resolutions, model.unet.num_res_blocks, model.unet.channel_mult,
      model.unet.num_head_channels, model.unet.transformer_depth, model.unet.context_dim, model.unet.use_linear,
      model.unet.addition_attention, model.unet.fs_condition, model.unet.default_fs, model.unet.image_cross_attention,
      model.unet.image_cross_attention_scale_learnable. model.resampler.dim, model.resampler.depth,
      model.resampler.dim_head, model.resampler.heads, model.resampler.embedding_dim, model.resampler.output_dim,
      model.resampler.ff_mult. model.text_layers: the last but one of 24. model.image_tokens: the class and 16x16
      patches. model.rate, sample.frame_rate: a stride of 3. data.frame_interval: 1-6. diffusion.train_steps,
      diffusion.beta_start, diffusion.beta_end, diffusion.beta_schedule: Stable Diffusion's.
      diffusion.zero_terminal_snr, diffusion.dynamic_rescale: not this model. train.condition_dropout: 5% without text,
      5% without picture, 5% without either. train.grad_clip: 0.5. sample.eta: 1. sample.spacing, sample.final_level:
      from 981, ending at a_0. sample.guidance_rescale: not this model. sample.fps: 8. sample.undo_rescale: as
      published. encoders.vae, encoders.text_encoder, encoders.tokenizer, encoders.image_encoder. encoders.latent: a
      sample of the posterior. encoders.normalize: off (encoders.latents_mean, encoders.latents_std: none).
    - Our choice, what is learnt. train.image_values: a fresh start leaves the text-to-video model as it is. No dropout
      in the convolutions along time, where the published fine-tuning has 0.1. train.betas, train.weight_decay: Adam.
      train.schedule, train.warmup_steps: constant. train.precision: bf16, where the published code has fp16.
      train.tf32: on.
      train.ema_decay, train.posthoc_ema, train.posthoc_snapshots: no average. train.noise_offset,
      train.timestep_shift, train.timestep_shift_steps: none. diffusion.data_scale: 1. data.views: one a clip.
    - For more frames than the model makes at once, which this paper has not. Of another (arXiv 2405.17306, section
      3.4): sample.long.gamma, sample.long.omega, sample.long.shuffle, sample.long.noise, sample.long.renormalise. Ours:
      sample.long.way, sample.long.overlap, sample.long.together.
    - Our choice, how it is computed. train.micro_batch, train.gradient_checkpointing, train.zero_stage: the fastest
      that fits an A100 with 80 GB (``--plan``). train.workers, train.gpus_per_worker, train.cpus_per_worker,
      train.offload, train.lanes, train.on_damaged,
      train.deepspeed, train.optimizer, train.tensorboard, train.text_states,
      train.max_skipped_steps, train.skip_steps, train.skip_samples, train.cache_gb,
      train.max_failures, train.image_tokens, ``compile``. train.seed, data.seed. train.log_every,
      train.checkpoint_every, train.keep_checkpoints,
      train.checkpoint_minutes, train.stop_file,
      train.sample_every, train.sample_count, train.held_out_shards,
      train.validate_every, train.grow, train.where, train.canary.
      data.fields: stored frames, of which image tokens are made in training.
      data.clips_per_shard, data.decoder, data.clip_timeout, data.clip_memory, data.decode_cpus, data.decode_resource,
      data.max_quarantine_share, data.encode_batch, data.encode_actors, data.encode_gpus,
      data.decode_tasks, data.wait_for_nodes, data.encode_resource, train.resource, data.scores, data.other_shapes.
    - Not used here. train.context_init: stage 2's. train.prompt_dropout, train.lora_rank, train.lora_alpha,
      train.lora_layers, data.ssim, data.bucket_edges, encoders.vae_decoder, encoders.flow.
    """
    return _published(DynamiCrafterRecipe, "dynamicrafter-256", (256, 256), "models/dynamicrafter-256-stage2")


def dynamicrafter_256_stage1() -> StillsRecipe:
    """The first stage of the paper's training: the query transformer and what attends to its tokens, beside Stable
    Diffusion 2.1, on single frames.

    Where it departs from stage 3 (`dynamicrafter_256`, which names the source of every other key):

    - train.lr 1e-4, train.max_steps 1 000 000, of section 4.1. train.init: a text-to-image model; layers along time
      are there and change nothing. train.trainable: the gate stays 1 (the authors, in the code's issues).
    - data.size: 512x512, at which that model was trained (likewise).
    - model.unet.in_channels: noisy latents alone.
    - diffusion.prediction: the noise, which the published base predicts.
    """
    return _stage(
        StillsRecipe, "dynamicrafter-256-stage1", (512, 512), 1e-4, 1_000_000, "context", "models/sd-2-1-base.ckpt"
    )


def dynamicrafter_256_stage2() -> DynamiCrafterRecipe:
    """The second stage: what stage 1 learnt moves to the text-to-video model, whose spatial layers learn with it.

    Where it departs from stage 3 (`dynamicrafter_256`):

    - train.max_steps 30 000, of section 4.1. train.init: VideoCrafter's text-to-video model at 256x256, with what
      stage 1 learnt (train.context_init).
    - model.unet.in_channels: noisy latents alone, before visual detail guidance.
    """
    stage1 = "models/dynamicrafter-256-stage1"
    kind, base = DynamiCrafterRecipe, "models/videocrafter-256.ckpt"
    return _stage(kind, "dynamicrafter-256-stage2", (256, 256), 5e-5, 30_000, "spatial", base, context_init=stage1)


def dynamicrafter_512() -> DynamiCrafterRecipe:
    """The published 320x512 model: v, zero terminal SNR, clean latents scaled down to 0.7 (all the published code's).

    The network is that of 256 but for the gate of the image tokens, which is not learnt, and is told frames per second.
    """
    return _wide(DynamiCrafterRecipe, "dynamicrafter-512", (320, 512), rescale=0.7, frame_rate=24)


def dynamicrafter_1024() -> DynamiCrafterRecipe:
    """The published 576x1024 model: as 512, with clean latents scaled down to 0.3."""
    return _wide(DynamiCrafterRecipe, "dynamicrafter-1024", (576, 1024), rescale=0.3, frame_rate=10)


def dynamicrafter_512_interp() -> InterpolationRecipe:
    """The published model between two pictures, at 320x512 (section 4.5; the numbers are the published code's)."""
    return _wide(InterpolationRecipe, "dynamicrafter-512-interp", (320, 512), rescale=0.7, frame_rate=5)


def dynamicrafter_tiny() -> DynamiCrafterRecipe:
    """The same method with small networks at 64x96 pixels, for two CPU cores.

    It starts from networks that ship with the package (``--set train.init=null``: from nothing;
    `cinemo/assets/dynamicrafter-tiny/CARD.md` has the figures). Where it departs from the published models, and why:

    - diffusion, sample.spacing: v and zero terminal SNR as from 320x512 on, but clean latents keep their size
      (diffusion.dynamic_rescale): channels of unit deviation need no rescaling at 64x96.
    - train.condition_frame: the first, which is the one that is asked for; a clip's other frames as the given one are
      more than minutes of training can take.
    - train.trainable: all, as the published fine-tuning does: there is no text-to-video model to protect.
    - train.timestep_shift 4: as for `cinemo-tiny`, motion is decided near pure noise.
    - sample.steps 25, half the published number. sample.eta stays 1: without fresh noise a step keeps what grain the
      steps before it left (1 - SSIM of a standing picture is 0.0081 so, 0.0059 with it), and a zoom is hardly more.
    - sample.guidance_scale 3 in the noisier half (sample.guidance_interval, arXiv 2404.07724), where motion is decided:
      in every step its contrast grows from frame to frame. sample.final_level clean: the noise of step 0, which
      published sampling leaves, would be half of what changes from frame to frame.
    - encoders: those of `cinemo-tiny`, and an image model of 65 tokens.
    """
    return DynamiCrafterRecipe(
        name="dynamicrafter-tiny",
        data=DataConfig(size=(64, 96), clips_per_shard=16, bucket_edges=RENDERED_EDGES, fields=("first_frame",)),
        encoders=EncodersConfig(latent="mode", image_encoder="package:tiny/image_encoder"),
        model=DynamiCrafterModel(
            unet=DynamiCrafterConfig(
                in_channels=32,
                out_channels=16,
                model_channels=64,
                channel_mult=(1, 1),
                num_res_blocks=1,
                attention_resolutions=(1, 2),
                num_head_channels=16,
                context_dim=64,
                default_fs=6,
            ),
            resampler=ResamplerConfig(
                dim=64, depth=2, dim_head=16, heads=4, num_queries=4, embedding_dim=64, output_dim=64
            ),
            text_layers=None,
            image_tokens=65,
        ),
        diffusion=DiffusionConfig(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction="v",
            zero_terminal_snr=True,
        ),
        train=DynamiCrafterTrain(
            workers=2,
            global_batch=8,
            micro_batch=4,
            max_steps=300,
            lr=2e-4,
            warmup_steps=20,
            schedule="cosine",
            trainable="all",
            condition_frame="first",
            timestep_shift=4.0,
            precision="fp32",
            init="package:dynamicrafter-tiny",
            lanes=2,
            log_every=5,
            checkpoint_every=100,
            sample_every=100,
        ),
        sample=DynamiCrafterSample(
            steps=25,
            guidance_scale=3.0,
            guidance_interval=(0.5, 1.0),
            spacing="trailing",
            final_level="clean",
            frame_rate=6,
        ),
    )


def _published(
    kind: type[Run],
    name: str,
    size: tuple[int, int],
    init: str,
    model: DynamiCrafterModel | None = None,
    diffusion: dict[str, Any] | None = None,
    sample: dict[str, Any] | None = None,
) -> Run:
    return kind(
        name=name,
        data=DataConfig(size=size, frame_interval=(1, 6), fields=_fields(kind), encode_gpus=1.0),
        encoders=ENCODERS,
        model=model or DynamiCrafterModel(),
        diffusion=DiffusionConfig(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **(diffusion or {})
        ),
        train=DynamiCrafterTrain(
            global_batch=64,
            micro_batch=_AT_ONCE[size],
            lr=5e-5,
            grad_clip=0.5,
            gpus_per_worker=1,
            init=init,
        ),
        sample=DynamiCrafterSample(**(sample or {})),
    )


def _stage(
    kind: type[Run],
    name: str,
    size: tuple[int, int],
    lr: float,
    steps: int,
    trainable: str,
    init: str,
    context_init: str | None = None,
) -> Run:
    recipe = _published(kind, name, size, init, DynamiCrafterModel(unet=DynamiCrafterConfig(in_channels=4)))
    changed = {"lr": lr, "max_steps": steps, "trainable": trainable, "context_init": context_init}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changed)})


def _wide(kind: type[Run], name: str, size: tuple[int, int], rescale: float, frame_rate: int) -> Run:
    unet = DynamiCrafterConfig(image_cross_attention_scale_learnable=False)
    return _published(
        kind,
        name,
        size,
        f"models/{name}.ckpt",
        DynamiCrafterModel(unet=unet, rate="fps"),
        {"prediction": "v", "zero_terminal_snr": True, "dynamic_rescale": rescale},
        {"spacing": "trailing", "guidance_rescale": 0.7, "frame_rate": frame_rate},
    )


def _fields(kind: type[DynamiCrafterRecipe]) -> tuple[Any, ...]:
    return ("first_frame",) if kind is InterpolationRecipe else ("frames",)
