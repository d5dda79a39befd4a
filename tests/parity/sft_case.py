"""The SFT loss of a tiny batch in PyTorch, written from the recipe, with autograd gradients."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from converters.torch_reference import TorchSa2VA
from converters.torch_sft import LINEARS, LowRank, batch_inputs
from tests import tiny
from tests.parity.sam2_weights import balance_iou_head, load_torch, our_names
from tests.parity.torch_sa2va import our_sa2va, random_torch_sa2va
from vrt_jax.models.lora import add_lora
from vrt_jax.models.sa2va import Sa2VA

MODEL = dataclasses.replace(  # transformers has no global attention where the width changes
  tiny.MODEL,
  sam2=dataclasses.replace(tiny.MODEL.sam2, stages=(1, 1, 2, 1), global_attention_blocks=(3,)),
)
IGNORED = -100
NUM_POINTS = 96


@dataclass(frozen=True)
class Rules:
  """How the loss is computed; the defaults are the recipe's, anything else a control."""

  align_corners: bool = False
  padding_mode: str = "zeros"
  smooth: float = 1.0
  bce_weight: float = 2.0
  dice_weight: float = 0.5
  shift: int = 1
  """Labels between the position that predicts and the token."""
  mean_of_samples: bool = False
  """Text loss as a mean of the samples' means instead of a mean over all tokens."""
  lora_scale: float = 2.0
  post_norm: bool = False


def low_rank_layers(model: TorchSa2VA) -> dict[str, LowRank]:
  """Wraps the seven linear layers of every text layer; name within the layer -> wrapper."""
  torch.manual_seed(7)
  rank, scale = tiny.LORA.rank, tiny.LORA.alpha / tiny.LORA.rank
  wrapped = {}
  for i, layer in enumerate(model.qwen.model.language_model.layers):
    for parent_name, names in LINEARS.items():
      parent = layer.get_submodule(parent_name)
      for name in names:
        linear = getattr(parent, name)
        down, up = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
        low_rank = LowRank(linear, down * linear.in_features**-0.5, 0.5 * up, scale)
        setattr(parent, name, low_rank)
        wrapped[f"{i}.{parent_name}.{name}"] = low_rank
  return wrapped


@functools.cache
def sides() -> tuple[TorchSa2VA, dict[str, LowRank], Sa2VA]:
  """PyTorch's model, frozen but for what the recipe trains; its adapters; ours, the same."""
  model = random_torch_sa2va(MODEL, tiny.tokenizer().image_pad_id)
  model.requires_grad_(False)
  ours = add_lora(our_sa2va(MODEL, model), tiny.LORA, seed=0)
  low_rank = low_rank_layers(model)
  iou = torch.cat([model.decode(*inputs)[1] for inputs in mask_inputs(model)])
  balance_iou_head(model.sam2, iou.detach())
  ours.sam2 = load_torch(MODEL.sam2, model.sam2.state_dict())
  for part, name in ((p, n) for p, names in LINEARS.items() for n in names):
    layers = [low_rank[f"{i}.{part}.{name}"] for i in range(MODEL.text.num_layers)]
    linear = getattr(getattr(ours.qwen.language_model.layers, part), name)
    for ab in ("lora_a", "lora_b"):
      value = torch.stack([getattr(layer, ab).detach() for layer in layers])
      getattr(linear, ab).set_value(jnp.asarray(value.numpy()))
  model.text_hidden_fcs.requires_grad_(True)
  model.sam2.mask_decoder.requires_grad_(True)
  return model, low_rank, ours


@functools.cache
def points() -> np.ndarray:
  """[B * M, Q, 2] in the unit square, borders included."""
  batch = tiny.batch()
  rows = batch.targets.seg_positions.size
  return np.random.default_rng(5).uniform(size=(rows, NUM_POINTS, 2)).astype(np.float32)


def torch_hidden_states(model: TorchSa2VA) -> tuple[Tensor, Tensor]:
  """(logits, states before the final norm) of the tiny batch."""
  model.last_layer_outputs.clear()
  out = model.qwen(**batch_inputs(tiny.batch()))
  return out.logits, model.states()


def mask_inputs(
  model: TorchSa2VA, hidden: Tensor | None = None
) -> Iterator[tuple[list[Tensor], Tensor]]:
  """(pyramid maps, [SEG] states) of each sample."""
  if hidden is None:
    hidden = torch_hidden_states(model)[1]
  batch = tiny.batch()
  for i, positions in enumerate(batch.targets.seg_positions):
    yield model.image_maps(batch.grounding_image[i]), hidden[i, positions.tolist()]


def text_loss(logits: Tensor, labels: Tensor, rules: Rules) -> Tensor:
  """Mean cross-entropy of the labelled tokens of the whole batch."""
  length = logits.shape[1] - rules.shift
  predictions, targets = logits[:, :length], labels[:, rules.shift :]
  losses = F.cross_entropy(
    predictions.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
  )
  counts = (targets != IGNORED).sum(dim=1)
  if rules.mean_of_samples:
    return (losses.sum(dim=1) / counts).mean()
  return losses.sum() / counts.sum()


def sample(maps: Tensor, rules: Rules) -> Tensor:
  """[R, Y, X] at the given points, [R, Q]."""
  grid = 2 * torch.tensor(points())[:, None] - 1
  values = F.grid_sample(
    maps[:, None], grid, padding_mode=rules.padding_mode, align_corners=rules.align_corners
  )
  return values[:, 0, 0]


def mask_losses(masks: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
  """(BCE, dice) of mask logits [R, Y, X] as the recipe states them."""
  truth = torch.tensor(tiny.batch().targets.masks).float().flatten(0, 1)
  logits, targets = sample(masks, rules), sample(truth, rules)
  bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
  probs = logits.sigmoid()
  overlap = 2 * (probs * targets).sum(dim=1) + rules.smooth
  dice = 1 - overlap / (probs.sum(dim=1) + targets.sum(dim=1) + rules.smooth)
  return bce / (logits.numel() + 1e-4), dice.sum() / (len(logits) + 1e-4)


def torch_losses(rules: Rules) -> dict[str, Tensor]:
  """Loss and its parts, named as our metrics."""
  model, low_rank, _ = sides()
  for layer in low_rank.values():
    layer.scale = rules.lora_scale
  logits, hidden = torch_hidden_states(model)
  if rules.post_norm:
    hidden = model.qwen.model.language_model.norm(hidden)
  masks = [model.best_masks(*inputs)[0] for inputs in mask_inputs(model, hidden)]
  labels = torch.tensor(tiny.batch().targets.labels, dtype=torch.long)
  text = text_loss(logits, labels, rules)
  bce, dice = mask_losses(torch.cat(masks), rules)
  loss = text + rules.bce_weight * bce + rules.dice_weight * dice
  return {"loss": loss, "loss/text": text, "loss/mask_bce": bce, "loss/mask_dice": dice}


def torch_gradients(loss: Tensor) -> dict[str, np.ndarray]:
  """Gradients of all trained parameters under our names; zeros where the loss does not reach."""
  model, low_rank, _ = sides()
  fcs, decoder = model.text_hidden_fcs, model.sam2.mask_decoder
  named = {
    f"lora.{name}.{ab}": getattr(m, ab)
    for name, m in low_rank.items()
    for ab in ("lora_a", "lora_b")
  }
  named |= {f"text_hidden_fcs.{name}": p for name, p in fcs.named_parameters()}
  named |= {f"mask_decoder.{name}": p for name, p in decoder.named_parameters()}
  grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
  found = {
    name: torch.zeros_like(p) if g is None else g
    for (name, p), g in zip(named.items(), grads, strict=True)
  }
  ours = {}
  for name in {key.removeprefix("lora.0.") for key in found if key.startswith("lora.0.")}:
    layers = [found[f"lora.{i}.{name}"] for i in range(MODEL.text.num_layers)]
    ours[f"qwen.language_model.layers.{name}"] = torch.stack(layers)
  for layer, index in (("fc1", 0), ("fc2", 2)):
    for part in ("weight", "bias"):
      ours[f"text_hidden_fcs.{layer}.{part}"] = found[f"text_hidden_fcs.{index}.{part}"]
  decoder_names = {name: g for name, g in found.items() if name.startswith("mask_decoder")}
  ours |= {f"sam2.{name}": g for name, g in our_names(decoder_names).items()}
  return {name: g.numpy() for name, g in ours.items()}
