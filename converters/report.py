"""What a conversion did: counts, bytes, and what was left out and why."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.conversion import Conversion
from converters.streams import StreamedArray

REPORT_FILE = "conversion.json"
CHECKSUM_FILE = "checksums.json"


def totals(arrays: Mapping[str, StreamedArray]) -> dict[str, dict[str, int]]:
  """Part of the model -> number of tensors, values and bytes."""
  parts: dict[str, dict[str, int]] = {}
  for name, array in arrays.items():
    part = ".".join(name.split(".")[:2])
    entry = parts.setdefault(part, {"tensors": 0, "values": 0, "bytes": 0})
    entry["tensors"] += 1
    entry["values"] += array.size
    entry["bytes"] += array.nbytes
  return dict(sorted(parts.items()))


def conversion_report(result: Conversion, src: str, seconds: float) -> dict[str, Any]:
  """The content of conversion.json."""
  reasons: dict[str, list[str]] = {}
  for key, reason in result.ignored.items():
    reasons.setdefault(reason, []).append(key)
  return {
    "source": src,
    "parts": totals(result.params),
    "dtypes": sorted({array.dtype.name for array in result.params.values()}),
    "checkpoint_tensors": len(result.checksums.hex()),
    "ignored": {reason: sorted(keys) for reason, keys in reasons.items()},
    "carried": sorted(result.carried),
    "notes": result.notes,
    "seconds": round(seconds, 1),
  }


def print_report(report: Mapping[str, Any]) -> None:
  """The report as a table."""
  print(f"{'part':<32}{'tensors':>8}{'values':>16}{'MB':>10}")
  for part, entry in report["parts"].items():
    print(f"{part:<32}{entry['tensors']:>8}{entry['values']:>16,}{entry['bytes'] / 1e6:>10,.1f}")
  print(f"{report['checkpoint_tensors']} tensors converted, {', '.join(report['dtypes'])}")
  for reason, keys in report["ignored"].items():
    print(f"ignored {len(keys)}: {reason} ({keys[0]}, ..)")
  for note in report["notes"]:
    print(f"note: {note}")
  print(f"{report['seconds']} s")


def write_json(path: Path, content: object) -> None:
  """Writes indented JSON."""
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
