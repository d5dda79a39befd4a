"""vrt-jax: visual reasoning tracing (R-Sa2VA, arXiv 2512.05091) in JAX and Flax nnx."""

__version__ = "0.1.0"
