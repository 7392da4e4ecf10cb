"""Runs of Controllable Longer Image Animation (arXiv 2405.17306)."""

from __future__ import annotations

from cinemo.config import DataConfig, LongConfig
from cinemo.methods.longer import LongerModel, LongerRecipe, LongerSample, LongerTrain
from cinemo.networks.field_refiner import RefinerConfig
from cinemo.networks.motion_field import FieldUNetConfig
from cinemo.recipes.cinemo import cinemo_320x512, cinemo_tiny


def longer_320x512() -> LongerRecipe:
    """The paper (arXiv 2405.17306) on Cinemo's backbone, where it has Stable Video Diffusion's at 512x512, 25 frames.

    Every key, by where its value is from (a test holds this list complete):

    - Section 4.1. train.lr: 3e-5, constant (train.schedule, train.warmup_steps), with AdamW (train.weight_decay,
      train.betas). train.max_steps: 100 000. train.global_batch: 4 on two GPUs (train.workers, train.gpus_per_worker,
      train.micro_batch). train.trainable: all but the spatial layers. train.lora_rank: 16, train.lora_layers: of the
      temporal attention, train.lora_alpha: equal to the rank; for static cameras, trained alone
      (``longer-320x512-static``). sample.long.way: phased, sample.long.gamma: 0.8, sample.long.omega: 0.2.
    - Section 3. data.fields: flow (3.2). sample.long.shuffle: all further frames (equation 12). sample.long.noise: as
      the first segment had it. sample.long.renormalise: not (equation 10).
    - Cinemo (arXiv 2407.15642), whose backbone this is. train.init: its weights. data.frames: 16. data.size,
      data.frame_interval, data.bucket_edges. encoders.vae, encoders.vae_decoder, encoders.text_encoder,
      encoders.tokenizer. encoders.latent: a sample of the posterior. encoders.normalize: off (encoders.latents_mean,
      encoders.latents_std: none). model.unet.in_channels, model.unet.out_channels, model.unet.block_out_channels,
      model.unet.layers_per_block, model.unet.norm_num_groups, model.unet.cross_attention_dim,
      model.unet.attention_head_dim, model.unet.addition_time_embed_dim. diffusion.train_steps, diffusion.beta_start,
      diffusion.beta_end, diffusion.beta_schedule, diffusion.prediction, diffusion.data_scale,
      diffusion.zero_terminal_snr, diffusion.dynamic_rescale. train.noise_offset, train.timestep_shift,
      train.timestep_shift_steps, train.min_snr_gamma: none. train.prompt_dropout: 0.5. sample.solver, sample.steps:
      DDIM, 50. sample.guidance_scale: 7.5 (sample.guidance_interval, sample.guidance_rescale, sample.reuse_features).
      sample.spacing, sample.final_level, sample.eta. sample.fps: 8.
    - Our choice, where the paper is silent. model.unet.field_widths: 64 and 128 before the UNet's own.
      model.unet.field_tokens: 4096. model.unet.flow_scale: 20 pixels a frame. model.strength_factor: 100, so that its
      100..400 are 1..4 pixels a frame. train.field_dropout, train.strength_dropout: 0.1. train.hint_share: none, the
      paper's fields are measured ones. sample.motion_speed, sample.fastest: of its 100..400.
      sample.motion_guidance_scale: 1. model.refiner.widths, model.refiner.critic_widths, model.refiner.scale: as
      flow_scale; sample.refine: on, which changes nothing until ``longer-320x512-refiner`` has trained it.
      train.grad_clip: 1. train.ema_decay, train.posthoc_ema, train.posthoc_snapshots: no average.
      train.precision: bf16. train.tf32: on.
      data.ssim, data.views. sample.long.overlap, sample.long.together.
    - Our choice, how it is computed. train.gradient_checkpointing: none, as two samples hold 15 GB of activations at
      most. train.zero_stage, train.offload,
      train.cpus_per_worker, train.lanes, train.on_damaged,
      train.deepspeed, train.optimizer, train.tensorboard, train.text_states,
      train.max_skipped_steps, train.skip_steps, train.skip_samples, train.cache_gb, train.max_failures, ``compile``.
      train.seed, data.seed. train.log_every, train.checkpoint_every, train.keep_checkpoints,
      train.checkpoint_minutes, train.stop_file, train.sample_every,
      train.sample_count, train.held_out_shards, train.validate_every, train.grow, train.where, train.canary.
      data.clips_per_shard, data.decoder,
      data.clip_timeout, data.clip_memory, data.decode_cpus, data.decode_resource, data.max_quarantine_share,
      data.encode_batch, data.encode_actors, data.encode_gpus,
      data.decode_tasks, data.wait_for_nodes, data.encode_resource, train.resource.
    - Not used here. encoders.image_encoder. encoders.flow: its weights make flow RAFT's, as the paper's was.
    """
    return LongerRecipe(
        name="longer-320x512",
        data=DataConfig(encode_gpus=1.0, fields=("flow",)),
        encoders=cinemo_320x512().encoders,
        train=LongerTrain(
            workers=2,
            gpus_per_worker=1,
            global_batch=4,
            micro_batch=2,
            lanes=2,
            max_steps=100_000,
            lr=3e-5,
            trainable="temporal",
            lora_layers=tuple(f"attn_temp.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
            init="models/cinemo/unet",
        ),
        sample=LongerSample(long=LongConfig(way="phased")),
    )


def longer_320x512_static() -> LongerRecipe:
    """The LoRA for a camera that stands still (section 4.1): rank 16 on temporal attention, everything else frozen.

    ``train.init``: a trained `longer_320x512`. ``data``: clips whose camera stands still, 5,000 in the paper.
    """
    base = longer_320x512()
    train = base.train.model_copy(update={"trainable": "lora", "init": "models/longer-320x512"})
    return base.model_copy(update={"name": "longer-320x512-static", "train": train})


def longer_320x512_refiner() -> LongerRecipe:
    """The refinement network of arrows' fields (section 3.2), trained alone on stored flow and first frames.

    The paper has 10,000 steps of 32 samples. train.lr: its 5e-3 is 25 times what pix2pix uses and the default here;
    ``--set train.lr=5e-3`` is the paper's. train.betas: pix2pix's. ``train.init``: a trained `longer_320x512`.
    """
    return _refining(longer_320x512(), "models/longer-320x512")


def longer_tiny_refiner() -> LongerRecipe:
    """The same of `longer_tiny`, with batches of 16."""
    recipe = _refining(longer_tiny(), "package:longer-tiny")
    steps = {"global_batch": 16, "micro_batch": 8, "validate_every": 1000}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=steps)})


def _refining(base: LongerRecipe, init: str) -> LongerRecipe:
    train = base.train.model_copy(
        update={
            "trainable": "refiner",
            "init": init,
            "lr": 2e-4,
            "betas": (0.5, 0.999),
            "schedule": "constant",
            "warmup_steps": 0,
            "global_batch": 32,
            "micro_batch": 16,
            "max_steps": 10_000,
            "sample_every": 0,
            "precision": "fp32",  # what is frozen is exported as it is held
        }
    )
    fields = base.data.model_copy(update={"fields": ("flow", "first_frame")})
    return base.model_copy(update={"name": f"{base.name}-refiner", "data": fields, "train": train})


def longer_tiny() -> LongerRecipe:
    """The same method with small networks at 64x96 pixels, for two CPU cores.

    Where it departs from the paper, and why:

    - diffusion, encoders, train.timestep_shift, sample.final_level, guidance: as for `cinemo-tiny`.
    - train.init: networks that ship with the package, made from the base of `cinemo-tiny`
      (`cinemo/assets/longer-tiny/CARD.md` has the figures).
    - train.trainable: all, as there is no image model to protect.
    - train.hint_share 0.7: most samples are given what a person would draw in the place of the measured field, so that
      no network has to make one of the other. train.prompt_dropout 0.5: captions of rendered clips say the direction;
      with them at hand (0.1) arrows were heard less (the card). sample.motion_guidance_scale 3 makes up for small
      networks. sample.refine: off, with it arrows are followed less: what it makes of one is faster in fewer places.
    - model.strength_factor: of the speeds of rendered clips, the range of Cinemo's buckets, which the base knows.
      model.unet.flow_scale, model.refiner.scale: of 64 pixels what 20 are of 512. model.unet.field_tokens: over frames
      and cells at once in the inner level alone.
    - sample.long.way: windows, whose seams show least.
    """
    base = cinemo_tiny()
    train = base.train.model_dump(exclude={"image_dropout", "motion_dropout", "prompt_dropout", "init"})
    sample = base.sample.model_dump(include={"steps", "final_level", "guidance_scale", "guidance_interval"})
    return LongerRecipe(
        name="longer-tiny",
        data=base.data.model_copy(update={"fields": ("flow",)}),
        encoders=base.encoders,
        model=LongerModel(
            unet=FieldUNetConfig(**base.model.model_dump(), field_widths=(32,), field_tokens=512, flow_scale=2.5),
            refiner=RefinerConfig(widths=(32, 64, 96), critic_widths=(32, 64), scale=2.5),
            strength_factor=1.5,
        ),
        diffusion=base.diffusion,
        train=LongerTrain(**train, init="package:longer-tiny", prompt_dropout=0.5, hint_share=0.7),
        sample=LongerSample(**sample, motion_speed=400, fastest=1200, motion_guidance_scale=3.0, refine=False),
    )
