"""Stages of PyTorch's Sa2VA as functions that can be timed."""

import numpy as np
import torch
from torch import Tensor

from converters.torch_twin import prompt_inputs, torch_twin
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.transforms import Prompt
from vrt_jax.models.sa2va import Sa2VA


class TorchSide:
  """A model of ours in PyTorch, float32; transformers' code throughout."""

  def __init__(self, model: Sa2VA, tokenizer: ChatTokenizer):
    self.model = torch_twin(model, tokenizer)
    self._tokenizer = tokenizer

  def to_bfloat16(self) -> "TorchSide":
    """The same with weights and activations in bfloat16."""
    self.model.to(torch.bfloat16)
    return self

  def _inputs(self, prompt: Prompt, rows: int = 1) -> dict[str, Tensor]:
    inputs = prompt_inputs(prompt, self._tokenizer, rows)
    return inputs | {"pixel_values": inputs["pixel_values"].to(self.model.qwen.dtype)}

  def prefill(self, prompt: Prompt) -> np.ndarray:
    """Logits of the last token, [V]."""
    self.model.last_layer_outputs.clear()
    with torch.no_grad():
      out = self.model.qwen(**self._inputs(prompt), logits_to_keep=1, use_cache=True)
    return out.logits[0, -1].numpy()

  def generate(self, prompt: Prompt, rows: int, count: int) -> np.ndarray:
    """Greedy tokens [rows, count]; no row ends before."""
    self.model.last_layer_outputs.clear()
    inputs = self._inputs(prompt, rows)
    with torch.no_grad():
      out = self.model.qwen.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        eos_token_id=self._tokenizer.im_end_id,
        pad_token_id=self._tokenizer.endoftext_id,
        suppress_tokens=list(self._tokenizer.never_sample_ids),
      )
    return out[:, inputs["input_ids"].shape[1] :].numpy()

  def image_maps(self, image: np.ndarray) -> list[Tensor]:
    """SAM 2's features of a picture [Y, X, 3] uint8."""
    return self.model.image_maps(image)

  def masks(self, maps: list[Tensor], states: np.ndarray) -> np.ndarray:
    """Low-resolution mask logits [M, Y4, X4] of [SEG] states [M, D]."""
    with torch.no_grad():
      return self.model.best_masks(maps, torch.from_numpy(states))[0].numpy()

  def predict(
    self,
    prompt: Prompt,
    count: int,
    seg: int,
    max_masks: int,
    size: tuple[int, int],
    *,
    encode_once: bool,
  ) -> np.ndarray:
    """Greedy text, and masks [M, Y, X] of its first tokens `seg`, bool, at (height, width) `size`.

    As Sa2VAChatModelQwen.predict_forward, which encodes the picture for every [SEG]; or once.
    """
    tokens = self.generate(prompt, 1, count)[0]
    states = self.model.states()[0, len(prompt.input_ids) :]
    places = np.flatnonzero(tokens[:-1] == seg)[:max_masks]
    groups = [places] if encode_once else [place[None] for place in places]
    with torch.no_grad():
      found = [
        self.model.best_masks(self.image_maps(prompt.grounding_image), states[group])[0]
        for group in groups
      ]
      masks = torch.cat(found)[:, None]
      for target in (prompt.grounding_image.shape[:2], size):
        masks = torch.nn.functional.interpolate(masks, size=target, mode="bilinear")
    return (masks[:, 0] > 0).numpy()
