"""Adding LoRA adapters to a model, and folding them into the weights they adapt."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vrt_jax.config import LoraConfig
from vrt_jax.models.sa2va import Sa2VA, abstract_sa2va


def add_lora(model: Sa2VA, lora: LoraConfig, seed: int) -> Sa2VA:
  """The same model with fresh adapters: A uniform in +-1/sqrt(in), B zero, so the same outputs.

  The parameters of `model` are shared, not copied. Source: PEFT's LoraLayer.reset_lora_parameters.
  """
  config = dataclasses.replace(model.config, lora=lora)
  graphdef, abstract = nnx.split(abstract_sa2va(config))
  given = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  filled = {}
  for i, (path, variable) in enumerate(nnx.to_flat_state(abstract)):
    shape = variable.get_value().shape
    if path in given:
      filled[path] = given[path]
    elif path[-1] == "lora_a":
      key = jax.random.fold_in(jax.random.key(seed), i)
      bound = shape[-1] ** -0.5
      filled[path] = variable.replace(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
    else:
      filled[path] = variable.replace(jnp.zeros(shape))
  return nnx.merge(graphdef, nnx.from_flat_state(filled))


def without_lora(model: Sa2VA) -> Sa2VA:
  """The model that the adapters were added to; its parameters are shared, not copied."""
  config = dataclasses.replace(model.config, lora=LoraConfig())
  flat = nnx.to_flat_state(nnx.state(model))
  kept = {path: v for path, v in flat if path[-1] not in ("lora_a", "lora_b")}
  return nnx.merge(nnx.split(abstract_sa2va(config))[0], nnx.from_flat_state(kept))


def merge_lora(model: Sa2VA) -> Sa2VA:
  """The model without adapters: W + (alpha / rank) B A, summed in float32.

  The given model stays as it is; one without adapters is returned itself.
  """
  lora = model.config.lora
  if not lora.rank:
    return model
  config = dataclasses.replace(model.config, lora=LoraConfig())
  flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  merged = {}
  for path, variable in flat.items():
    if path[-1] in ("lora_a", "lora_b"):
      continue
    value = variable.get_value()
    if path[-1] == "weight" and (*path[:-1], "lora_a") in flat:
      a = flat[(*path[:-1], "lora_a")].get_value().astype(jnp.float32)
      b = flat[(*path[:-1], "lora_b")].get_value().astype(jnp.float32)
      update = jnp.einsum("...or,...ri->...oi", b, a) * (lora.alpha / lora.rank)
      value = (value.astype(jnp.float32) + update).astype(value.dtype)
    merged[path] = variable.replace(value)
  graphdef, _ = nnx.split(abstract_sa2va(config))
  return nnx.merge(graphdef, nnx.from_flat_state(merged))
