"""Our parameters under the names of other people's checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.params_reader import StoredParams
from converters.qwen3_vl_rules import qwen3_vl_table
from converters.rules import OpName, RuleTable, Shape, raise_all
from converters.sa2va_rules import QWEN_PREFIX, sa2va_table
from converters.sam2_rules import HF
from converters.streams import StreamedArray, merge_adapters, of_source, stacked_rows
from converters.tensor_files import SafetensorsFiles
from converters.training_checkpoint import ADAPTERS, PEFT_PREFIX
from vrt_jax import model_directory
from vrt_jax.config import ImageConfig, ModelConfig, TrainConfig, from_dict
from vrt_jax.data.chat import ChatTokenizer


@dataclass(frozen=True)
class Source:
  """A trained model whose parameters have not been read yet."""

  model: ModelConfig
  image: ImageConfig
  tokenizer: ChatTokenizer
  params: dict[str, StreamedArray]
  carried: Path | None

  @property
  def lora_scale(self) -> float:
    """alpha / rank."""
    return self.model.lora.alpha / self.model.lora.rank

  def merged(self) -> dict[str, StreamedArray]:
    """The parameters with adapters merged into the weights."""
    return merge_adapters(self.params, self.lora_scale) if self.model.lora.rank else self.params


def open_source(src: str) -> Source:
  """A model directory, or the newest checkpoint of a training workdir on top of its base model.

  Raises:
    ValueError: `src` is neither.
  """
  workdir = Path(src)
  if (workdir / "checkpoints").is_dir() and (workdir / "config.json").is_file():
    return _open_workdir(workdir)
  folder = model_directory.resolve(src)
  carried = folder / model_directory.CARRIED
  return Source(
    model=model_directory.read_json(folder / "config.json", ModelConfig),
    image=model_directory.read_json(folder / "processor.json", ImageConfig),
    tokenizer=ChatTokenizer.from_dir(folder / "tokenizer"),
    params=StoredParams(folder / "params").arrays,
    carried=carried if carried.is_dir() else None,
  )


def _open_workdir(workdir: Path) -> Source:
  config = from_dict(TrainConfig, json.loads((workdir / "config.json").read_text()), str(workdir))
  if not config.base:
    raise ValueError(f"{workdir} started from random weights: convert {workdir / 'model'}")
  steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
  if not steps:
    raise ValueError(f"{workdir / 'checkpoints'} holds no checkpoint yet")
  base = open_source(config.base)
  state = workdir / "checkpoints" / str(max(steps)) / "state"
  trained = StoredParams(state, prefix="trainable.").arrays
  model = ModelConfig(**{**vars(base.model), "lora": config.model.lora})
  return Source(model, base.image, base.tokenizer, base.params | trained, base.carried)


def checkpoint_shape(op: OpName, shape: Shape, kernel: Shape) -> Shape:
  """The checkpoint's shape of our `shape`; `kernel` is that of a patch convolution."""
  if op == "conv1x1":
    return (*shape, 1, 1)
  return (shape[0], *kernel) if op == "flat" else shape


def rename(
  table: RuleTable, params: Mapping[str, StreamedArray], kernel: Shape = ()
) -> dict[str, StreamedArray]:
  """Parameters as the tensors of a checkpoint; tied second copies are not written."""
  tensors: dict[str, StreamedArray] = {}
  rows: dict[str, list[StreamedArray]] = {}
  for target, array in params.items():
    rule, parts = table.parts(target, array.shape[0])
    for part in parts:
      value = array if part.layer is None else array.layer(part.layer)
      if part.row is not None:
        rows.setdefault(part.key, []).append(value)
      else:
        tensors[part.key] = value.reshape(checkpoint_shape(rule.op, value.shape, kernel))
  return tensors | {key: stacked_rows(values) for key, values in rows.items()}


def carried_tensors(carried: Path | None) -> dict[str, StreamedArray]:
  """Tensors that our models do not have and a conversion kept."""
  file = carried / "tensors.safetensors" if carried else None
  if file is None or not file.is_file():
    return {}
  source = SafetensorsFiles([file])
  raise_all(source.problems)
  return {key: of_source(source, key) for key in source.shapes}


def carried_ties(carried: Path | None) -> dict[str, str]:
  """Second copies that the original checkpoint had."""
  file = carried / "ties.json" if carried else None
  return json.loads(file.read_text()) if file is not None and file.is_file() else {}


def patch_kernel(model: ModelConfig) -> Shape:
  """[3, frames, patch, patch]: what one row of the patch embedding looks at."""
  v = model.vision
  return (3, v.temporal_patch_size, v.patch_size, v.patch_size)


def sa2va_tensors(source: Source) -> dict[str, StreamedArray]:
  """Every tensor of a Sa2VA export."""
  table = sa2va_table(source.model.text.tie_embeddings)
  tensors = rename(table, source.merged(), patch_kernel(source.model))
  tensors |= {copy: tensors[original] for copy, original in carried_ties(source.carried).items()}
  return tensors | carried_tensors(source.carried)


def qwen_tensors(source: Source) -> dict[str, StreamedArray]:
  """Every tensor of a plain Qwen3-VL."""
  params = {k: v for k, v in source.merged().items() if k.startswith("qwen.")}
  return rename(
    qwen3_vl_table(source.model.text.tie_embeddings), params, patch_kernel(source.model)
  )


def sam2_tensors(source: Source) -> dict[str, StreamedArray]:
  """Every tensor of transformers' Sam2Model."""
  params = {k: v for k, v in source.params.items() if k.startswith("sam2.")}
  tensors = rename(HF, params)
  return tensors | {tie.copy: tensors[tie.original] for tie in HF.tied}


def adapter_tensors(source: Source) -> dict[str, StreamedArray]:
  """LoRA's matrices under PEFT's names.

  Raises:
    ValueError: the model has no adapters.
  """
  adapters = {k: v for k, v in source.params.items() if k.endswith((".lora_a", ".lora_b"))}
  if not adapters:
    raise ValueError(
      "the model has no adapters: --adapter takes a training workdir or a model that kept them"
    )
  names = rename(ADAPTERS, adapters)
  return {f"{PEFT_PREFIX}{key.removeprefix(QWEN_PREFIX)}": value for key, value in names.items()}
