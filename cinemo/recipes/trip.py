"""Named runs of TRIP: the paper's, its ablation with linear fusion, and one for two CPU cores."""

from __future__ import annotations

from cinemo.config import DataConfig, DiffusionConfig, EncodersConfig, TrainConfig
from cinemo.methods.trip import TripLinearModel, TripLinearRecipe, TripModel, TripRecipe, TripSample, TripTrain
from cinemo.networks.lavie_unet import UNetConfig
from cinemo.networks.noise_fusion import FusionConfig
from cinemo.recipes.cinemo import RENDERED_EDGES

_ENCODERS = EncodersConfig(
    vae="models/sd-v1-4/vae",
    vae_decoder="models/cinemo/vae_temporal_decoder",
    text_encoder="models/sd-v1-4/text_encoder",
    tokenizer="models/sd-v1-4/tokenizer",
)
_DATA = DataConfig(size=(256, 256), frame_interval=(6, 8), encode_gpus=1.0)
_SAMPLE = TripSample(fps=4)


def trip_256() -> TripRecipe:
    """The paper (arXiv 2403.17005): 8 GPUs, 16 frames at 4 a second, 256x256, LaVie in the place of its 3D-UNet.

    Every key, by where its value is from (a test holds this list complete):

    - Section 4.1. data.frames: 16. data.size: the centre of the resized frame. data.frame_interval: about 4 frames a
      second of clips with 24 to 32; intervals count frames, so clips with 60 are sampled at twice the rate.
      sample.fps: 4. diffusion.train_steps: 1000, diffusion.beta_start, diffusion.beta_end, diffusion.beta_schedule:
      linear, 1e-4..2e-2. sample.solver, sample.steps: DDIM, 50. train.lr: 2e-6 for the UNet, train.fusion_lr: 2e-4
      for the fusion module, with AdamW. train.workers: 8, with one GPU each (train.gpus_per_worker).
      encoders.text_encoder, encoders.tokenizer: CLIP (section 3.1).
    - Section 3. diffusion.prediction: the noise (equation 10), with equal weights (train.min_snr_gamma), of latents
      as they are (diffusion.data_scale, diffusion.zero_terminal_snr, diffusion.dynamic_rescale, train.noise_offset,
      train.timestep_shift, train.timestep_shift_steps). model.layout: the picture before the frames. model.tnf_space,
      model.tnf_ref_scale: noise, the prior as equation 8 has it. model.fusion.axis: "spatial feature normalization"
      (3.4). train.trainable: both networks.
    - LaVie (arXiv 2309.15103, on Stable Diffusion v1.4), where the paper has a UNet like ModelScope's on v2.1 that is
      not here; its schedule is the paper's. model.backbone, train.init. encoders.vae, encoders.vae_decoder: as
      cinemo-320x512 has them. encoders.normalize: off (encoders.latents_mean, encoders.latents_std: none).
      model.unet: its published network. model.text_layers: all.
    - Our choice, what is learnt: the paper has no word on it. model.fusion.width, model.fusion.heads: the UNet's
      outermost. model.fusion.patch: 1 at this size. model.fusion.positions: on, since attention alone cannot tell
      which pixel of the prior is which. train.max_steps, train.global_batch, train.micro_batch: 100 000 steps of 64
      (DynamiCrafter, arXiv 2310.12190). train.weight_decay, train.betas: AdamW's defaults. train.prompt_dropout: 0.1,
      as is usual. train.schedule, train.warmup_steps: constant. train.grad_clip: 1. train.ema_decay,
      train.posthoc_ema, train.posthoc_snapshots: no average. train.precision: bf16. train.tf32: on. encoders.latent: a
      sample of the posterior. data.views: one a clip.
      sample.guidance_scale: 7.5 (sample.guidance_interval, sample.guidance_rescale, sample.reuse_features: at every
      step, as it is). sample.eta: 0. sample.spacing, sample.final_level: diffusers' "leading", ending at a_0.
      sample.replace_first: the given picture is the first frame.
    - For more frames than the model makes at once, which this paper has not. Of another (arXiv 2405.17306, section
      3.4): sample.long.gamma, sample.long.omega, sample.long.shuffle, sample.long.noise, sample.long.renormalise. Ours:
      sample.long.way, sample.long.overlap, sample.long.together.
    - Our choice, how it is computed. train.gradient_checkpointing: none, as eight samples hold 26 GB of
      activations. train.zero_stage, train.offload, train.cpus_per_worker, train.lanes, train.on_damaged,
      train.deepspeed, train.optimizer, train.tensorboard, train.text_states,
      train.max_skipped_steps, train.skip_steps, train.skip_samples, train.cache_gb,
      train.max_failures, ``compile``. train.seed, data.seed. train.log_every, train.checkpoint_every,
      train.keep_checkpoints,
      train.checkpoint_minutes, train.stop_file,
      train.sample_every, train.sample_count, train.held_out_shards, train.validate_every,
      train.grow, train.where, train.canary. data.clips_per_shard, data.decoder, data.clip_timeout, data.clip_memory,
      data.decode_cpus, data.decode_resource, data.max_quarantine_share, data.encode_batch, data.encode_actors,
      data.encode_gpus, data.decode_tasks, data.wait_for_nodes, data.encode_resource, train.resource.
      data.ssim, data.bucket_edges: of reports alone.
    - Not used here. train.lora_rank, train.lora_alpha, train.lora_layers, data.fields, data.scores, data.other_shapes,
      encoders.image_encoder, encoders.flow.
    """
    return TripRecipe(
        name="trip-256",
        data=_DATA,
        encoders=_ENCODERS,
        train=TripTrain(
            gpus_per_worker=1,
            global_batch=64,
            micro_batch=8,
            lr=2e-6,
            fusion_lr=2e-4,
            weight_decay=0.01,
            prompt_dropout=0.1,
            init="models/lavie_base.pt",
        ),
        sample=_SAMPLE,
    )


def trip_w_256() -> TripLinearRecipe:
    """TRIP^W (table 6): equation 9 in the place of the fusion module, with the ends that `trip.lambda_schedule` has.

    All else is `trip_256`'s. With both ends 0 it is TRIP^-, the residual path alone.
    """
    return TripLinearRecipe(
        name="trip-w-256",
        data=_DATA,
        encoders=_ENCODERS,
        model=TripLinearModel(lambda_start=1.0, lambda_end=0.0),
        train=TrainConfig(
            gpus_per_worker=1,
            global_batch=64,
            micro_batch=8,
            lr=2e-6,
            weight_decay=0.01,
            prompt_dropout=0.1,
            init="models/lavie_base.pt",
        ),
        sample=_SAMPLE,
    )


def trip_tiny() -> TripRecipe:
    """The same method with small networks at 64x96 pixels, for two CPU cores.

    It starts from networks that ship with the package (``--set train.init=null``: from nothing;
    `cinemo/assets/trip-tiny/CARD.md` has the figures). They were made from the UNet of `cinemo-tiny`, which knew this
    world and its captions but had learnt residuals, and saw the picture in every frame: this one had to learn to fetch
    it from the frame before. Where it departs from the paper, and why:

    - diffusion.prediction: v, which that UNet predicts. model.tnf_space: so v is what the fusion module merges.
    - model.fusion: as wide as this UNet's outermost level.
    - train.timestep_shift 4, train.prompt_dropout 0.1, encoders: as for `cinemo-tiny`.
    - sample.final_level clean: as for `cinemo-tiny`.
    - sample.guidance_scale 2: with 3 contrast grows from frame to frame, with 1.5 frames become grainier.
    - train.lr, train.fusion_lr: a hundred and five times the paper's, for minutes instead of days.
    """
    return TripRecipe(
        name="trip-tiny",
        data=DataConfig(size=(64, 96), clips_per_shard=16, bucket_edges=RENDERED_EDGES),
        encoders=EncodersConfig(latent="mode"),
        model=TripModel(
            unet=UNetConfig(
                in_channels=16,
                out_channels=16,
                block_out_channels=(64, 128),
                layers_per_block=1,
                norm_num_groups=16,
                cross_attention_dim=64,
                attention_head_dim=1,
                addition_time_embed_dim=64,
            ),
            fusion=FusionConfig(width=64, heads=4),
            tnf_space="output",
        ),
        diffusion=DiffusionConfig(prediction="v"),
        train=TripTrain(
            workers=2,
            global_batch=8,
            micro_batch=4,
            max_steps=300,
            lr=2e-4,
            fusion_lr=1e-3,
            warmup_steps=20,
            schedule="cosine",
            weight_decay=0.01,
            prompt_dropout=0.1,
            timestep_shift=4.0,
            precision="fp32",
            init="package:trip-tiny",
            lanes=2,
            log_every=5,
            checkpoint_every=100,
            sample_every=100,
        ),
        sample=TripSample(steps=25, guidance_scale=2.0, final_level="clean"),
    )
