"""A group of samples by transformers' generate, from the weights of a model of ours."""

from collections.abc import Callable

import numpy as np
import torch

from converters.torch_twin import prompt_inputs, qwen_twin
from vrt_jax.config import GrpoConfig
from vrt_jax.data.chat import ChatTokenizer
from vrt_jax.data.transforms import Prompt
from vrt_jax.models.sa2va import Sa2VA


def torch_group(
  model: Sa2VA, prompt: Prompt, tokenizer: ChatTokenizer, grpo: GrpoConfig
) -> Callable[[], np.ndarray]:
  """A function that gives the new tokens [G, N] of one prompt; no sample ends before N.

  Temperature 0 is greedy.
  """
  theirs = qwen_twin(model, tokenizer)
  inputs = prompt_inputs(prompt, tokenizer)

  def run() -> np.ndarray:
    with torch.no_grad():
      out = theirs.generate(
        **inputs,
        do_sample=True,
        temperature=grpo.temperature or 1.0,
        top_p=grpo.top_p,
        top_k=0 if grpo.temperature else 1,
        num_return_sequences=grpo.group_size,
        min_new_tokens=grpo.max_new_tokens,
        max_new_tokens=grpo.max_new_tokens,
        eos_token_id=tokenizer.im_end_id,
        pad_token_id=tokenizer.endoftext_id,
        suppress_tokens=list(tokenizer.never_sample_ids),
      )
    return out[:, len(prompt.input_ids) :].numpy()

  return run
