"""Projection heads on top of the backbone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.models import layers, ops

ACTIVATIONS = {
  "gelu": ops.gelu,
  "relu": nn.relu,
}
NORMS = ("none", "ln")


@dataclasses.dataclass(frozen=True)
class HeadKeys:
  """Heads of AttMask, iBOT and DINO."""

  shared_head: bool = schema.key(
    True, "one prototype layer for class and patch tokens of the student"
  )
  shared_head_teacher: bool = schema.key(True, "the same for the teacher")
  out_dim: int = schema.key(8192, "prototypes of the class token", low=1)
  patch_out_dim: int = schema.key(
    8192, "prototypes of patches, if the heads are separate", low=1
  )
  head_hidden: int = schema.key(2048, "width of the hidden layers", low=1)
  head_bottleneck: int = schema.key(256, "input width of prototypes", low=1)
  head_act: str = schema.key(
    "gelu", "activation of the hidden layers", choices=tuple(ACTIVATIONS)
  )
  head_norm: str = schema.key(
    "none", "norm before the activation; ln = LayerNorm", choices=NORMS
  )


@dataclasses.dataclass(frozen=True)
class ProjectorKeys:
  """Projector and predictor of ExtreMA."""

  head_hidden: int = schema.key(
    4096, "width of the hidden layers of projector and predictor", low=1
  )
  out_dim: int = schema.key(256, "width of their outputs", low=1)


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
  """[..., E] @ [E, K] -> [..., K] float32, in the inputs' precision.

  The derivative multiplies in that precision, too: JAX's own would use the
  float32 cotangent, and bfloat16 training would run its widest products in
  float32.
  """
  return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _matmul_forward(
  x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return matmul(x, w), (x, w)


def _matmul_backward(
  saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, w = saved
  grad = grad.astype(x.dtype)
  dx = jnp.matmul(grad, w.T, preferred_element_type=jnp.float32)
  dw = jnp.einsum("...c,...k->ck", x, grad, preferred_element_type=jnp.float32)
  return dx.astype(x.dtype), dw.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Prototypes(nn.Module):
  """Weight-normalised linear map without bias: [..., E] -> [..., K] float32.

  `W = g * v / |v|` with one gain and one direction per prototype.
  """

  out_dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    width = z.shape[-1]
    v = self.param(
      "weight_v", layers.uniform_fan_in(width), (width, self.out_dim)
    )
    g = self.param("weight_g", nn.initializers.ones, (self.out_dim,))
    w = v * (g / jnp.linalg.norm(v, axis=0))[None]
    return matmul(z.astype(self.dtype), w.astype(self.dtype))


class ProjectionMlp(nn.Module):
  """MLP with L2-normalised outputs: [..., D] -> [..., E] float32."""

  hidden: int
  bottleneck: int
  layers: int
  act: str
  norm: str
  dtype: Any
  initial: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    # quirk: one norm instance serves all hidden layers, as in iBOT.
    norm = None
    if self.norm == "ln":
      norm = layers.LayerNorm(1e-5, name="norm")
    for i in range(self.layers):
      width = self.bottleneck if i == self.layers - 1 else self.hidden
      x = nn.Dense(
        width,
        dtype=self.dtype,
        kernel_init=layers.linear_init(self.initial),
        name=f"layer_{i}",
      )(x)
      if i < self.layers - 1:
        x = x if norm is None else norm(x)
        x = ACTIVATIONS[self.act](x)
    x = x.astype(jnp.float32)
    # The maximum is inside the root: the gradient of a norm at 0 is NaN.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))


class Head(nn.Module):
  """DINO / iBOT head: one MLP, then prototypes for class and patch tokens.

  Attributes:
    out_dim: K, prototypes of the class token.
    patch_out_dim: prototypes of patch tokens in their own layer
      (`last_layer2`); 0 = patches share the class token's layer.
    hidden: width of the hidden layers.
    bottleneck: E.
    layers: linear layers of the MLP.
    act: "gelu" (exact) or "relu".
    norm: "none" or "ln", between linear and activation.
    initial: initialisation of the MLP, "normal" or "xavier".

  Source: iBOTHead. differs: logits are computed for chosen tokens only.
  """

  out_dim: int
  patch_out_dim: int = 0
  hidden: int = HeadKeys.head_hidden
  bottleneck: int = HeadKeys.head_bottleneck
  layers: int = 3
  act: str = HeadKeys.head_act
  norm: str = HeadKeys.head_norm
  dtype: Any = jnp.float32
  initial: str = "normal"

  def setup(self) -> None:
    self.mlp = ProjectionMlp(
      self.hidden,
      self.bottleneck,
      self.layers,
      self.act,
      self.norm,
      self.dtype,
      self.initial,
    )
    self.last_layer = Prototypes(self.out_dim, self.dtype)
    if self.patch_out_dim:
      self.last_layer2 = Prototypes(self.patch_out_dim, self.dtype)

  def project(self, tokens: jax.Array) -> jax.Array:
    """[..., D] -> unit vectors [..., E] float32."""
    return self.mlp(tokens)

  def cls_logits(self, z: jax.Array) -> jax.Array:
    """[..., E] -> [..., K] float32."""
    return self.last_layer(z)

  def patch_logits(self, z: jax.Array) -> jax.Array:
    """[..., E] -> [..., patch_out_dim or K] float32."""
    return (self.last_layer2 if self.patch_out_dim else self.last_layer)(z)

  def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[R, L, D] -> class logits [R, K], patch logits [R, N, K]."""
    z = self.project(tokens)
    return self.cls_logits(z[:, 0]), self.patch_logits(z[:, 1:])


def from_config(section: ml_collections.ConfigDict) -> tuple[Head, Head]:
  """Heads of student and teacher from the section `method`.

  Raises:
    InputError: a teacher head that cannot follow the student's.
  """
  schema.check("method", section, HeadKeys)
  shared, shared_teacher = section.shared_head, section.shared_head_teacher
  if shared and not shared_teacher:
    raise InputError(
      "method.shared_head=True with method.shared_head_teacher=False leaves "
      "the teacher's patch layer without a student to follow: set both alike"
    )
  if not shared and shared_teacher and section.patch_out_dim != section.out_dim:
    raise InputError(
      f"a separate student head with method.patch_out_dim "
      f"{section.patch_out_dim} cannot follow a shared teacher head with "
      f"method.out_dim {section.out_dim}: set both to one size, or "
      "method.shared_head_teacher=False"
    )
  head = Head(
    out_dim=section.out_dim,
    patch_out_dim=0 if shared else section.patch_out_dim,
    hidden=section.head_hidden,
    bottleneck=section.head_bottleneck,
    act=section.head_act,
    norm=section.head_norm,
    dtype=jnp.dtype(section.dtype),
  )
  separate = 0 if shared_teacher else section.patch_out_dim
  return head, head.clone(patch_out_dim=separate)


class Projector(nn.Module):
  """MLP with LayerNorm and GELU after each hidden layer: [..., D] -> [..., E].

  Source: projector (two hidden layers) and predictor (one) of ExtreMA. Its
  LayerNorms have an epsilon of 1e-5, unlike the encoder's.

  Attributes:
    hidden: width of the hidden layers.
    out: E.
    layers: linear layers, at least 2.
    dtype: of matrix products.
  """

  hidden: int
  out: int
  layers: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.layers):
      width = self.out if i == self.layers - 1 else self.hidden
      x = nn.Dense(
        width,
        dtype=self.dtype,
        kernel_init=layers.linear_init("xavier"),
        name=f"layer_{i}",
      )(x)
      if i < self.layers - 1:
        x = ops.gelu(layers.LayerNorm(1e-5, name=f"norm_{i}")(x))
    return x.astype(jnp.float32)
