"""The named runs of Cinemo."""

from __future__ import annotations

from cinemo.config import DataConfig, DiffusionConfig, EncodersConfig
from cinemo.methods.cinemo import CinemoRecipe, CinemoSample, CinemoTrain
from cinemo.networks.lavie_unet import UNetConfig

# Between the buckets of rendered clips (`cinemo.media.synthetic`): at equal distances in sqrt(1 - SSIM), which grows
# as displacement does, up to what one clip in fifty exceeds. What stands still is in bucket 0.
RENDERED_EDGES = tuple(round(1 - (0.0083 * k) ** 2, 6) for k in range(19, 0, -1))


def cinemo_320x512() -> CinemoRecipe:
    """The paper (arXiv 2407.15642): 8 workers, global batch 80, 16 frames at interval 3-10, 320x512.

    Every key, by where its value is from (a test holds this list complete):

    - Section 4.1. data.frames: 16, so 15 residuals. data.size, data.frame_interval. train.workers: 8, with one GPU each
      (train.gpus_per_worker). train.global_batch: 80, 10 of them on each GPU. train.prompt_dropout:
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
      train.ema_decay, train.posthoc_ema, train.posthoc_snapshots: no average. train.precision: bf16. train.tf32: on.
      data.ssim: of luma. data.views: one a clip. sample.motion_bucket: the middle.
    - For more frames than the model makes at once, which this paper has not. Of another (arXiv 2405.17306, section
      3.4): sample.long.gamma, sample.long.omega, sample.long.shuffle, sample.long.noise, sample.long.renormalise. Ours:
      sample.long.way, sample.long.overlap, sample.long.together.
    - Our choice, how it is computed. train.micro_batch, train.gradient_checkpointing, train.zero_stage: the fastest
      that fits an A100 with 80 GB (``--plan``): twice 5 samples, of which nothing is computed twice.
      train.offload, train.cpus_per_worker, train.lanes, train.on_damaged, train.text_states, train.max_skipped_steps,
      train.skip_steps, train.skip_samples, train.deepspeed, train.optimizer, train.tensorboard,
      train.cache_gb, train.max_failures, ``compile``. train.seed, data.seed. train.log_every,
      train.checkpoint_every, train.keep_checkpoints, train.checkpoint_minutes, train.stop_file, train.sample_every,
      train.sample_count, train.held_out_shards,
      train.validate_every, train.grow, train.where, train.canary. data.clips_per_shard, data.decoder,
      data.clip_timeout, data.clip_memory, data.decode_cpus, data.decode_resource, data.max_quarantine_share,
      data.encode_batch, data.encode_actors, data.encode_gpus, data.decode_tasks, data.wait_for_nodes,
      data.encode_resource, train.resource.
    - Not used here. train.lora_rank, train.lora_alpha, train.lora_layers, data.fields, data.scores, data.other_shapes,
      encoders.image_encoder, encoders.flow.
    """
    return CinemoRecipe(
        name="cinemo-320x512",
        data=DataConfig(encode_gpus=1.0),
        encoders=EncodersConfig(
            vae="models/sd-v1-4/vae",
            vae_decoder="models/cinemo/vae_temporal_decoder",
            text_encoder="models/sd-v1-4/text_encoder",
            tokenizer="models/sd-v1-4/tokenizer",
        ),
        train=CinemoTrain(gpus_per_worker=1, micro_batch=5, init="models/lavie_base.pt"),
    )


def cinemo_tiny() -> CinemoRecipe:
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
    - sample.guidance_scale 5, in the noisier half of the schedule alone (sample.guidance_interval, arXiv 2404.07724):
      without guidance the motion is two thirds as fast as it should be; in the other half it adds grain where the
      picture is smooth, which drowns the lower motion buckets.
    - sample.final_level clean: the noise of step 0, which published sampling leaves, would be a third of the motion at
      bucket 0.
    """
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
        sample=CinemoSample(steps=25, final_level="clean", guidance_scale=5.0, guidance_interval=(0.5, 1.0)),
    )
