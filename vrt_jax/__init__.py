"""vrt-jax: visual reasoning tracing (R-Sa2VA, arXiv 2512.05091) in JAX and Flax nnx.

import vrt_jax

model = vrt_jax.load("shapes")
answer = model.ask("photo.jpg", "Which key opens the lock?")
print(answer.text, answer.masks.shape)
answer.overlay().save("overlay.png")
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
  """`load`, which brings JAX with it, when it is asked for (PEP 562)."""
  if name != "load":
    raise AttributeError(f"module 'vrt_jax' has no attribute {name!r}")
  from vrt_jax.generate.reasoner import load

  return load
