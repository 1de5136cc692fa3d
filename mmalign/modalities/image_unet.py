"""SD1.5 and SDXL: latent diffusion with a UNet, through diffusers.

What differs between the two is a table of two rows: SDXL adds a pooled embedding and six time ids (original
height and width, crop top and left, target height and width; arXiv 2307.01952 section 2.2).

Shapes: N samples, C = 4 latent channels, H W latent size (an eighth of the picture's), L = 77 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.modalities import Encoded
from mmalign.records import Comparison, UserError, open_image
from mmalign.surrogate.likelihood import Cond
from mmalign.surrogate.paths import VariancePreserving
from mmalign.surrogate.probes import at_least_float32

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"


def load(
    source: str | Path,
    lora: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    vae: str | Path | None = None,
    config: str | Path | None = None,
) -> UNetModality:
    """Loads SD1.5 or SDXL.

    Args:
        source: pipeline folder, hub id, or an original-format single file.
        lora: LoRA to put on as the policy's adapter, in diffusers or kohya keys.
        dtype: of UNet and text encoders; default bfloat16 on an accelerator, else float32.
        device: default the accelerator when there is one.
        vae: another VAE (hub id or folder), as `madebyollin/sdxl-vae-fp16-fix`; it runs in `dtype`. Without it
            the pipeline's own VAE runs in float32, as SDXL's overflows in float16.
        config: for a single file of an unusual size, a pipeline folder with its configurations.

    Raises:
        UserError: a part is missing or does not fit.
    """
    from diffusers import AutoencoderKL, DiffusionPipeline

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type != "cpu" else torch.float32)
    try:
        if Path(source).suffix in (".safetensors", ".ckpt"):
            from mmalign.modalities.single_file import load_pipeline

            pipeline = load_pipeline(Path(source), dtype, config)
        else:
            pipeline = DiffusionPipeline.from_pretrained(str(source), dtype=dtype)
        if vae:
            pipeline.vae = AutoencoderKL.from_pretrained(str(vae), dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{vae or source}: cannot be loaded ({str(error).splitlines()[0]}).") from error
    if not vae and dtype.itemsize < 4:
        pipeline.vae.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    modality = UNetModality(pipeline, str(source))
    if lora:
        modality.load_adapter(lora)
    return modality


def skeleton(source: str | Path) -> dict[str, nn.Module]:
    """UNet ("network") and frozen parts on the meta device: shapes without memory, for the memory plan."""
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if Path(source).suffix == ".safetensors":
        from mmalign.modalities.single_file import configurations

        configs = configurations(Path(source))
    else:
        names = DiffusionPipeline.load_config(str(source))
        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": None, "text_encoder_2": None}
        configs = {
            name: kind.load_config(str(source), subfolder=name)
            if kind
            else CLIPTextConfig.from_pretrained(str(source), subfolder=name).to_dict()
            for name, kind in kinds.items()
            if names.get(name, (None, None))[1]
        }
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "network": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
        }
        for name in ("text_encoder", "text_encoder_2"):
            if name in configs:
                parts[name] = CLIPTextModel(CLIPTextConfig(**configs[name]))
    return parts


class UNetModality:
    """A Stable Diffusion (XL) pipeline as the trainer sees it.

    Attributes:
        pipeline: the diffusers pipeline around the network.
        resolution: side of the training pictures in pixels.
    """

    def __init__(self, pipeline: Any, source: str = "") -> None:
        self.pipeline = pipeline
        self.source = source
        self.network: nn.Module = pipeline.unet
        self.is_xl = hasattr(pipeline, "text_encoder_2")
        self.resolution = self.unet.config.sample_size * pipeline.vae_scale_factor
        for part in (
            pipeline.unet,
            pipeline.vae,
            pipeline.text_encoder,
            getattr(pipeline, "text_encoder_2", None),
        ):
            if part is not None:
                part.requires_grad_(False).eval()
        scheduler = pipeline.scheduler
        self.path = VariancePreserving(scheduler.alphas_cumprod.clone(), scheduler.config.prediction_type)

    @property
    def unet(self) -> Any:
        """The network without what accelerate or compile wrapped around it."""
        network = getattr(self.network, "module", self.network)
        return getattr(network, "_orig_mod", network)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    # -- encoding ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, items: Sequence[Comparison]) -> Encoded:
        """Latents (posterior mean and deviation, scaled) and conditions of all media, comparison by comparison.

        Pictures keep their aspect: the shorter side is brought to `resolution`, the rest cropped at the centre.
        The time ids are those of a comparison's first picture, so that its members differ in nothing else.
        """
        pixels, ids, prompts = [], [], []
        for item in items:
            cropped = [self._crop(open_image(medium, name=f"{item.id}[{k}]")) for k, medium in enumerate(item.media)]
            pixels += [picture for picture, _ in cropped]
            ids += [cropped[0][1]] * len(cropped)
            prompts += [item.prompt] * len(cropped)
        vae = self.pipeline.vae
        batch = torch.stack(pixels).to(vae.device, vae.dtype)
        posteriors = [vae.encode(part).latent_dist for part in batch.split(8)]
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
        mean = (at_least_float32(torch.cat([posterior.mean for posterior in posteriors])) - shift) * scale
        std = at_least_float32(torch.cat([posterior.std for posterior in posteriors])) * scale
        if not torch.isfinite(mean).all():
            bad = [
                item.id for item, rows in zip(items, self._rows(items), strict=True) if not mean[rows].isfinite().all()
            ]
            raise UserError(
                f"The VAE gave non-finite latents for {', '.join(bad)}; run it in float32 or take the fp16-fix VAE."
            )
        unique = sorted(set(prompts))
        cond = self._embed(unique).rows([unique.index(prompt) for prompt in prompts])
        if self.is_xl:
            cond = Cond({**cond, "time_ids": torch.tensor(ids, device=self.device, dtype=torch.float32)})
        return Encoded(mean, std, cond)

    @staticmethod
    def _rows(items: Sequence[Comparison]) -> list[slice]:
        ends = np.cumsum([len(item.media) for item in items])
        return [slice(end - len(item.media), end) for item, end in zip(items, ends, strict=True)]

    def _crop(self, picture: Image.Image) -> tuple[Tensor, list[float]]:
        """[3, R, R] in [-1, 1], and the six time ids."""
        width, height = picture.size
        side = self.resolution
        factor = side / min(width, height)
        resized = picture.resize(
            (max(side, round(width * factor)), max(side, round(height * factor))), Image.Resampling.LANCZOS
        )
        left, top = (resized.width - side) // 2, (resized.height - side) // 2
        array = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=np.float32)
        return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1, [height, width, top, left, side, side]

    def _embed(self, prompts: list[str]) -> Cond:
        """Prompt embeddings [N, L, D], and for SDXL the pooled ones [N, D]."""
        device = self.pipeline.text_encoder.device
        made = self.pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        entries = {"prompt_embeds": made[0]}
        if self.is_xl:
            entries["text_embeds"] = made[2]
        return Cond(entries)

    @torch.no_grad()
    def empty(self) -> Cond:
        """The empty prompt as guidance meets it: zeros for SDXL's `force_zeros_for_empty_prompt`, else encoded."""
        cond = self._embed([""])
        if self.pipeline.config.get("force_zeros_for_empty_prompt", False):
            cond = Cond({name: torch.zeros_like(value) for name, value in cond.items()})
        return cond

    # -- the network ---------------------------------------------------------------------------------------

    def predict(self, probe: Any, view: str) -> Tensor:
        """[N, C, H, W], the network's output for noisy latents; the only call of the trained network."""
        cond = probe.cond.view(view).to(self.device, self.unet.dtype)
        added = {name: cond[name] for name in ("text_embeds", "time_ids") if name in cond} or None
        latents = probe.x_t.to(self.device, self.unet.dtype)
        return self.network(
            latents,
            probe.t.to(self.device),
            cond["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def lora_targets(self) -> list[str]:
        """The attention projections: the published Diffusion-DPO and MaPO LoRAs train these."""
        return ["to_k", "to_q", "to_v", "to_out.0"]

    # -- generation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures, one a prompt; picture i starts from noise of `seeds[i]` whatever the batch size.

        None takes the pipeline's own default. `progress` is told how many pictures a batch has finished.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed a prompt")
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
        }
        settings = {name: value for name, value in given.items() if value is not None}
        training = self.network.training
        self.network.eval()
        self.pipeline.unet = self.unet  # a view may have put other weights in place
        pictures: list[Image.Image] = []
        try:
            for start in range(0, len(prompts), batch_size):
                part = list(prompts[start : start + batch_size])
                noise = [torch.Generator().manual_seed(int(seed)) for seed in seeds[start : start + batch_size]]
                negative = None if negative_prompt is None else [negative_prompt] * len(part)
                latents = self.pipeline(
                    prompt=part, negative_prompt=negative, generator=noise, output_type="latent", **settings
                ).images
                pictures += self._decode(latents)
                if progress:
                    progress(len(part))
        finally:
            self.network.train(training)
        return pictures

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        """Our own, as the pipeline would hand half-precision latents to the float32 VAE."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return self.pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type="pil")

    # -- files ---------------------------------------------------------------------------------------------

    def load_adapter(self, path: str | Path, name: str = "policy") -> None:
        """Puts a LoRA on the network, in diffusers or kohya keys; its weights stay float32.

        Raises:
            UserError: the file is missing, holds no LoRA, or was made for another architecture.
        """
        path = Path(path)
        file = path / LORA_FILE if path.is_dir() else path
        local = file.exists() or path.is_absolute() or str(path).count("/") != 1
        if local and not file.is_file():
            raise UserError(f"{file}: no such LoRA file; give a .safetensors file or a folder with {LORA_FILE}.")
        unet = self.unet
        before = set(getattr(unet, "peft_config", {}))
        try:
            state, alphas, metadata = self.pipeline.lora_state_dict(
                str(file if local else path), unet_config=unet.config, return_lora_metadata=True
            )
            expected = {
                key for key in state if key.startswith("unet.") and key.endswith(("lora_A.weight", "lora.down.weight"))
            }
            self.pipeline.load_lora_into_unet(state, alphas, unet, adapter_name=name, metadata=metadata, _pipeline=None)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path}: this LoRA does not fit {self.source or 'the model'} ({reason}).") from error
        loaded = sum(name in getattr(module, "lora_A", {}) for module in unet.modules())
        if name in before or not expected or loaded != len(expected):
            raise UserError(
                f"{path}: {loaded} of its {len(expected)} UNet layers fit {self.source or 'the model'};"
                " it was made for another architecture."
            )
        for key, parameter in unet.named_parameters():
            if f".{name}." in key:
                parameter.data = at_least_float32(parameter.data)

    def save(self, folder: str | Path) -> None:
        """Writes the adapter in diffusers and in kohya keys, or the whole pipeline where there is no adapter."""
        folder = Path(folder)
        if "policy" in getattr(self.unet, "peft_config", {}):
            self._save_lora(folder)
        else:
            self.pipeline.unet = self.unet
            self.pipeline.save_pretrained(folder)

    def _save_lora(self, folder: Path) -> None:
        from diffusers.utils import convert_state_dict_to_kohya
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        unet = self.unet
        config = unet.peft_config["policy"]
        layers = {
            key: value.contiguous() for key, value in get_peft_model_state_dict(unet, adapter_name="policy").items()
        }
        type(self.pipeline).save_lora_weights(
            folder,
            unet_lora_layers=layers,
            weight_name=LORA_FILE,
            unet_lora_adapter_metadata=config.to_dict(),
        )
        kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in layers.items()})
        # diffusers writes alpha = rank; the adapter's own alpha is what keeps its strength.
        alpha = torch.tensor(float(config.lora_alpha))
        save_file(
            {key: alpha.clone() if key.endswith(".alpha") else value.contiguous() for key, value in kohya.items()},
            folder / KOHYA_FILE,
        )
