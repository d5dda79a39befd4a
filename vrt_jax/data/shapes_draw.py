"""Pictures of the shapes world: silhouettes, patterns, shading, and the visible masks."""

import functools
import math

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFilter

from vrt_jax.data.shapes_scene import Scene, Shape, draft_scene

_SCALE = 4  # supersampling of silhouettes
_PAD = 8  # margin of the canvas, cropped at the end
_MIN_VISIBLE_SHARE = 0.7
_MIN_VISIBLE_PIXELS = 120
_RGB = {
  "red": (216, 46, 46),
  "green": (44, 160, 66),
  "blue": (44, 96, 222),
  "yellow": (245, 204, 36),
  "purple": (146, 66, 190),
  "cyan": (40, 205, 218),
}
_LIGHT = ("yellow", "cyan")  # their second colour is darker, that of the others is lighter

Points = list[tuple[float, float]]


def _disc(x: float, y: float, radius: float, start: float = 0, stop: float = 360) -> Points:
  angles = np.deg2rad(np.linspace(start, stop, 33))
  return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _box(left: float, top: float, right: float, bottom: float, corner: float = 0.0) -> Points:
  if not corner:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]
  return [
    *_disc(right - corner, bottom - corner, corner, 0, 90),
    *_disc(left + corner, bottom - corner, corner, 90, 180),
    *_disc(left + corner, top + corner, corner, 180, 270),
    *_disc(right - corner, top + corner, corner, 270, 360),
  ]


def _ring_points(count: int, radii: tuple[float, ...]) -> Points:
  angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
  return [
    (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
    for i, a in enumerate(angles)
  ]


@functools.cache
def _parts(kind: str) -> tuple[list[Points], list[Points], list[Points]]:
  """Unit-radius polygons (y down): filled, cut out of the silhouette, painted dark on it."""
  parts = {
    "circle": ([_disc(0, 0, 0.95)], [], []),
    "square": ([_box(-0.78, -0.78, 0.78, 0.78)], [], []),
    "triangle": ([_ring_points(3, (1.05,))], [], []),
    "star": ([_ring_points(10, (1.05, 0.5))], [], []),
    "cross": ([_box(-0.95, -0.34, 0.95, 0.34), _box(-0.34, -0.95, 0.34, 0.95)], [], []),
    "moon": ([_disc(0, 0, 0.98)], [_disc(0.52, -0.22, 0.72)], []),
    "key": (
      [
        _disc(-0.45, 0, 0.55),
        _box(0.0, -0.17, 1.0, 0.17),
        _box(0.34, 0.1, 0.58, 0.56),
        _box(0.74, 0.1, 1.0, 0.56),
      ],
      [],
      [_disc(-0.55, 0, 0.2)],
    ),
    "lock": (
      [
        _disc(0, -0.35, 0.6, 180, 360),
        _box(-0.6, -0.36, 0.6, 0.1),
        _box(-0.8, -0.1, 0.8, 0.95, 0.14),
      ],
      [_disc(0, -0.35, 0.32, 180, 360), _box(-0.32, -0.36, 0.32, -0.1)],
      [_disc(0, 0.33, 0.17), [(-0.07, 0.35), (0.07, 0.35), (0.14, 0.72), (-0.14, 0.72)]],
    ),
    "plug": (
      [
        _box(-0.5, -0.98, -0.2, 0.0, 0.06),
        _box(0.2, -0.98, 0.5, 0.0, 0.06),
        _box(-0.75, -0.3, 0.75, 0.1, 0.08),
        _box(-0.62, -0.2, 0.62, 0.6, 0.3),
        _box(-0.17, 0.5, 0.17, 1.0),
      ],
      [],
      [],
    ),
    "socket": (
      [_box(-0.84, -0.84, 0.84, 0.84, 0.3)],
      [],
      [_disc(-0.34, 0, 0.19), _disc(0.34, 0, 0.19)],
    ),
  }
  return parts[kind]


def _corner(shape: Shape) -> tuple[int, int, int]:
  """Left and top of a shape's patch on the padded canvas, and the patch's side."""
  half = math.ceil(shape.radius * 1.12) + 4
  return math.floor(shape.x) - half + _PAD, math.floor(shape.y) - half + _PAD, 2 * half


def _silhouette(shape: Shape, dark: bool = False) -> Float[np.ndarray, "Y X"]:
  """Coverage in 0..1 of a shape (or of its dark parts) on its patch."""
  left, top, side = _corner(shape)
  centre_x, centre_y = shape.x + _PAD - left, shape.y + _PAD - top
  cos, sin = math.cos(shape.angle) * shape.radius, math.sin(shape.angle) * shape.radius
  image = Image.new("L", (side * _SCALE, side * _SCALE))
  draw = ImageDraw.Draw(image)
  solid, cut, holes = _parts(shape.kind)
  for polygons, value in [(holes, 255)] if dark else [(solid, 255), (cut, 0)]:
    for points in polygons:
      turned = [
        ((centre_x + cos * x - sin * y) * _SCALE, (centre_y + sin * x + cos * y) * _SCALE)
        for x, y in points
      ]
      draw.polygon(turned, fill=value)
  return np.asarray(image.reduce(_SCALE), np.float32) / 255


def _blur(alpha: Float[np.ndarray, "Y X"], radius: float) -> Float[np.ndarray, "Y X"]:
  image = Image.fromarray((alpha * 255).astype(np.uint8))
  return np.asarray(image.filter(ImageFilter.BoxBlur(radius)), np.float32) / 255


def _second_colour_share(shape: Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Share in 0..1 of the pattern's second colour at pattern coordinates in pixels."""
  period = float(np.clip(0.4 * shape.radius, 6.5, 10))
  if shape.pattern == "striped":
    wave = np.sin(2 * np.pi * (u + v) / math.sqrt(2) / period)
    return np.clip(0.5 + 1.4 * wave, 0, 1)
  if shape.pattern == "dotted":
    row = np.round(v / period)
    shifted = u / period - 0.5 * (row % 2)
    distance = np.hypot(shifted - np.round(shifted), v / period - row) * period
    return np.clip(0.31 * period - distance + 0.5, 0, 1)
  return np.zeros_like(u)


def _paint(
  shape: Shape, alpha: Float[np.ndarray, "Y X"], rng: np.random.Generator
) -> Float[np.ndarray, "Y X 3"]:
  """The shaded and patterned colours of a shape's patch, 0..255."""
  left, top, side = _corner(shape)
  steps = np.arange(side, dtype=np.float32) + 0.5
  dx = steps[None, :] - (shape.x + _PAD - left)
  dy = steps[:, None] - (shape.y + _PAD - top)
  cos, sin = math.cos(shape.angle), math.sin(shape.angle)
  base = np.array(_RGB[shape.colour], np.float32) + rng.uniform(-9, 9, 3).astype(np.float32)
  second = base * 0.5 if shape.colour in _LIGHT else 0.32 * base + 0.68 * 255
  share = _second_colour_share(shape, cos * dx + sin * dy, cos * dy - sin * dx)[..., None]
  colour = base + (second - base) * share
  light = 1.0 - 0.14 * (dx + dy) / shape.radius
  rim = np.clip(2.2 * _blur(alpha, 1.5) - 1.1, 0, 1)
  colour = colour * (light * (0.55 + 0.45 * rim))[..., None]
  if _parts(shape.kind)[2]:
    colour = colour * (1 - 0.85 * _silhouette(shape, dark=True))[..., None]
  return colour


def _background(scene: Scene, rng: np.random.Generator) -> Float[np.ndarray, "Y X 3"]:
  """A muted gradient with soft blotches and grain, on the padded canvas."""
  height, width = scene.height + 2 * _PAD, scene.width + 2 * _PAD
  value = rng.uniform(120, 215)
  first, last = value + rng.uniform(-14, 14, (2, 3)) + rng.uniform(-16, 16, (2, 1))
  angle = rng.uniform(0, 2 * np.pi)
  x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(0.35 * np.cos(angle))
  y = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(0.35 * np.sin(angle))
  mix = 0.5 + x[None, :] + y[:, None]
  coarse = Image.fromarray(rng.normal(0, 7, (9, 9)).astype(np.float32))
  blotches = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
  grain = rng.standard_normal((height, width), np.float32) * np.float32(3)
  ramp = (last - first).astype(np.float32)
  return mix[..., None] * ramp + first.astype(np.float32) + (blotches + grain)[..., None]


def _visible(
  scene: Scene, alphas: list[Float[np.ndarray, "Y X"]]
) -> tuple[list[Bool[np.ndarray, "Y X"]], bool]:
  """Visible masks in drawing order, and whether enough is visible of every shape."""
  height, width = scene.height + 2 * _PAD, scene.width + 2 * _PAD
  owner = np.full((height, width), -1, np.int32)
  totals = []
  for index, (shape, alpha) in enumerate(zip(scene.shapes, alphas, strict=True)):
    left, top, side = _corner(shape)
    inside = alpha > 0.5
    owner[top : top + side, left : left + side][inside] = index
    totals.append(int(inside.sum()))
  owner = owner[_PAD:-_PAD, _PAD:-_PAD]
  masks = [owner == index for index in range(len(scene.shapes))]
  seen = [int(mask.sum()) for mask in masks]
  enough = all(
    s >= max(_MIN_VISIBLE_PIXELS, _MIN_VISIBLE_SHARE * t) for s, t in zip(seen, totals, strict=True)
  )
  return masks, enough


def is_visible(scene: Scene) -> bool:
  """Whether at least 70 % of every shape, and at least 120 pixels, can be seen."""
  return _visible(scene, [_silhouette(shape) for shape in scene.shapes])[1]


def make_scene(rng: np.random.Generator, split: str) -> Scene:
  """Draws a scene in which every shape can be seen; `split` is "train" or "eval"."""
  while True:
    scene = draft_scene(rng, split)
    if is_visible(scene):
      return scene


def render(scene: Scene) -> tuple[UInt8[np.ndarray, "Y X 3"], list[Bool[np.ndarray, "Y X"]]]:
  """Draws a scene.

  Returns:
    the RGB picture, and the visible pixels of each of `scene.shapes`.
  """
  rng = np.random.default_rng(scene.seed)
  canvas = _background(scene, rng)
  alphas = [_silhouette(shape) for shape in scene.shapes]
  for shape, alpha in zip(scene.shapes, alphas, strict=True):
    left, top, side = _corner(shape)
    shadow = 1 - 0.38 * _blur(np.roll(alpha, (2, 1), (0, 1)), 2)
    patch = canvas[top : top + side, left : left + side]
    patch *= shadow[..., None]
    patch += (_paint(shape, alpha, rng) - patch) * alpha[..., None]
  picture = np.clip(canvas[_PAD:-_PAD, _PAD:-_PAD], 0, 255).round().astype(np.uint8)
  return picture, _visible(scene, alphas)[0]
