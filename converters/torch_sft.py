"""The reference's SFT step in PyTorch: LoRA, text and mask losses, AdamW.

As the recipe vrt_sa2va_4b_qwen3_sft states it, on transformers' Qwen3-VL and SAM 2; to measure
speed and memory beside ours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from converters.torch_reference import TorchSa2VA
from vrt_jax.config import LoraConfig, OptimConfig, SftLossConfig
from vrt_jax.data.image import normalize_patches
from vrt_jax.types import IGNORE_INDEX, Batch

LINEARS = {
  "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
  "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""The layers that LoRA adapts, by their parent in a text layer."""


class LowRank(nn.Module):
  """A frozen linear layer plus scale * B A dropout(x)."""

  def __init__(
    self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, rate: float = 0.0
  ):
    super().__init__()
    self.linear, self.scale, self.rate = linear, scale, rate
    self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)

  def forward(self, x: Tensor) -> Tensor:
    down = F.linear(F.dropout(x, self.rate, self.training), self.lora_a)
    return self.linear(x) + self.scale * F.linear(down, self.lora_b)


def add_low_rank(model: TorchSa2VA, lora: LoraConfig) -> None:
  """Puts fresh adapters (A random, B zero) on every text layer, in place."""
  for layer in model.qwen.model.language_model.layers:
    for parent_name, names in LINEARS.items():
      parent = layer.get_submodule(parent_name)
      for name in names:
        linear = getattr(parent, name)
        a = torch.randn(lora.rank, linear.in_features) * linear.in_features**-0.5
        b = torch.zeros(linear.out_features, lora.rank)
        setattr(parent, name, LowRank(linear, a, b, lora.alpha / lora.rank, lora.dropout))


class TorchSft:
  """What the reference trains of a model, its optimiser and its step."""

  def __init__(self, model: TorchSa2VA, lora: LoraConfig, optim: OptimConfig, loss: SftLossConfig):
    self.model, self._loss, self._clip = model, loss, optim.clip_norm
    model.requires_grad_(False)
    add_low_rank(model, lora)
    model.text_hidden_fcs.requires_grad_(True)
    model.sam2.mask_decoder.requires_grad_(True)
    self._trained = [p for p in model.parameters() if p.requires_grad]
    self._optimizer = torch.optim.AdamW(
      self._trained, optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
    )
    model.train()

  def step(self, batch: Batch) -> float:
    """One update; the loss before it."""
    self._optimizer.zero_grad()
    loss = self.loss(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(self._trained, self._clip)
    self._optimizer.step()
    return float(loss.detach())

  def loss(self, batch: Batch) -> Tensor:
    """Text and mask losses of a batch that has no padding but at the end of rows."""
    model, targets = self.model, batch.targets
    model.last_layer_outputs.clear()
    logits = model.qwen(**batch_inputs(batch)).logits
    hidden = model.states()
    labels = torch.tensor(np.asarray(targets.labels), dtype=torch.long)
    text = F.cross_entropy(
      logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    masks = [
      model.best_masks(model.image_maps(image), row[torch.tensor(np.asarray(positions))])[0]
      for image, row, positions in zip(
        np.asarray(batch.grounding_image), hidden, targets.seg_positions, strict=True
      )
    ]
    truth = torch.tensor(np.asarray(targets.masks)).float().flatten(0, 1)
    bce, dice = self._mask_losses(torch.cat(masks), truth)
    weights = self._loss
    return weights.text_weight * text + weights.bce_weight * bce + weights.dice_weight * dice

  def _mask_losses(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    points = self._points(logits.detach())
    at_points, true = _sample(logits, points), _sample(truth, points)
    bce = F.binary_cross_entropy_with_logits(at_points, true)
    probs = at_points.sigmoid()
    overlap = 2 * (probs * true).sum(1) + 1
    return bce, (1 - overlap / (probs.sum(1) + true.sum(1) + 1)).mean()

  def _points(self, logits: Tensor) -> Tensor:
    """[M, Q, 2] in the unit square: most of them where the logits are near 0."""
    config, count = self._loss, len(logits)
    drawn = torch.rand(count, int(config.num_points * config.oversample_ratio), 2)
    kept = int(config.importance_share * config.num_points)
    nearest = (-_sample(logits, drawn).abs()).topk(kept, dim=1).indices
    chosen = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(count, config.num_points - kept, 2)], dim=1)


def _sample(maps: Tensor, points: Tensor) -> Tensor:
  """[M, Y, X] at points [M, Q, 2] -> [M, Q]."""
  grid = 2 * points[:, None] - 1
  return F.grid_sample(maps[:, None], grid, align_corners=False)[:, 0, 0]


def batch_inputs(batch: Batch) -> dict[str, Tensor]:
  """A padded batch as transformers' Qwen3-VL takes it."""
  text, vision = batch.text, batch.vision
  real = np.asarray(vision.patch_segments) > 0
  pixels = normalize_patches(np.asarray(vision.pixel_values)[real])
  positions = np.asarray(vision.patch_positions)
  sides = [p[r].max(axis=0) + 1 for p, r in zip(positions, real, strict=True)]
  return {
    "input_ids": torch.tensor(np.asarray(text.input_ids), dtype=torch.long),
    "attention_mask": torch.tensor(np.asarray(text.token_mask), dtype=torch.long),
    "pixel_values": torch.tensor(np.asarray(pixels, np.float32)),
    "image_grid_thw": torch.tensor([[1, *side.tolist()] for side in sides]),
    "mm_token_type_ids": torch.tensor(np.asarray(text.visual_index) >= 0, dtype=torch.int),
  }
