"""MViT: one transformer over several resolutions of an image, coarse to fine (erow/vitookit, 'multiscale').

Differs from ViT in: the image at each of `image_sizes` through one patch embedding, each scale with its own copy of the
class token and a learned scale embedding; tokens see their own and coarser scales only; layer scale (arXiv 2103.17239);
the head reads an attention pooling of the finest scale's tokens. Parameter names follow the published weight files.

Published MViT-Ti on CIFAR-10 (32 px, patch 2, scales 16 and 32): 5,842,378 parameters, top-1 96.58.

    MViT(image_size=32, patch_size=2, num_classes=10, dim=192, depth=12, heads=12, mlp_dim=768)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """`F.dropout`; on a CPU from 16 random bits an element, at a fifth of the time that torch takes for its mask."""
    if p == 0.0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape).ge_(round(p * 2**16) - 2**15)
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def drop_path(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Drop whole samples of a residual branch with probability p (stochastic depth, arXiv 1603.09382)."""
    if p == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - p)
    return x * keep / (1 - p)


def sincos_1d(length: int, dim: int) -> torch.Tensor:
    """Positions 0 .. length - 1 as sines, then cosines; (length, d).

    The frequencies are 10000^(-exp(k / (d/2))), as the published code has them: all below 1e-4, so that neighbours
    start almost equal.
    """
    omega = 10000.0 ** -(torch.arange(dim // 2) / (dim / 2)).exp()
    angles = torch.outer(torch.arange(length).float(), omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def resampling(source: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """The matrix (target rows * columns, source rows * columns) that resamples a grid: bicubic, antialiased."""
    height, width = source
    basis = rearrange(torch.eye(height * width), "n (h w) -> 1 n h w", h=height)
    basis = F.interpolate(basis, size=target, mode="bicubic", antialias=True, align_corners=False)
    return rearrange(basis, "1 n h w -> (h w) n").contiguous()


class PatchEmbed(nn.Module):
    """Image (b, c, h, w) -> tokens (b, n, d): a convolution with kernel = stride = patch."""

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return rearrange(self.proj(x), "b d h w -> b (h w) d")
        # As one product: a CPU's gradient of this convolution takes up to a fifth of a whole ViT-B_32 step.
        p, q = self.proj.kernel_size
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    """Scaled dot-product attention of queries (b, h, n, d) over keys and values (b, h, m, d)."""
    # In bfloat16 a CPU trains it 2 to 7 times faster as plain products; otherwise torch chooses the kernel.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        b, scale = q.shape[0], q.shape[-1] ** -0.5
        q, k, v = (rearrange(x, "b h n d -> (b h) n d") for x in (q, k, v))
        weights = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale).softmax(dim=-1)
        return rearrange(dropout(weights, dropout_p, True) @ v, "(b h) n d -> b h n d", b=b)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


class Attention(nn.Module):
    """Multi-head self-attention, block-causal: the `lengths` tokens of each scale see that scale and those before."""

    def __init__(self, dim: int, heads: int, lengths: Sequence[int], attn_drop: float = 0.0):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.spans = [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Attention after the softmax, (b, heads, n, n); zero for what a token doesn't see."""
        q, k, _ = self.split_heads(x)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        for start, end in self.spans:
            scores[..., start:end, end:] = -torch.inf
        return scores.softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split_heads(x)
        dropout_p = self.attn_drop if self.training else 0.0
        # One call a scale with only the keys it sees: no mask, which would rule out the fastest kernels.
        scales = [attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], dropout_p) for start, end in self.spans]
        return self.proj(rearrange(torch.cat(scales, dim=2), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between, dropout after both."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """x + gamma_1 attention(norm(x)), then x + gamma_2 mlp(norm(x))."""

    def __init__(
        self, dim: int, heads: int, mlp_dim: int, lengths: Sequence[int], dropout: float, attn_drop: float,
        drop_path: float,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, lengths, attn_drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-4))
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + drop_path(self.gamma_1 * self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.gamma_2 * self.mlp(self.norm2(x)), self.drop_path, self.training)


class AttentionPool(nn.Module):
    """Tokens (b, n, d) -> (b, d): a learned query attends to them, then x + mlp(norm(x)).

    `latent` holds a query for each scale, as the published files do; the finest scale's, the last, is the one in use.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, scales: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.zeros(1, scales, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, mlp_dim, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = repeat(self.q(self.latent[:, -1:]), "1 1 (h d) -> b h 1 d", b=x.shape[0], h=self.heads)
        k, v = rearrange(self.kv(x), "b n (kv h d) -> kv b h n d", kv=2, h=self.heads)
        x = self.proj(rearrange(attend(q, k, v), "b h 1 d -> b (h d)"))
        return x + self.mlp(self.norm(x))


class MViT(nn.Module):
    """Vision Transformer over several resolutions in one sequence.

    Args, where they are not as ViT's:
        patch_size, heads: the same in every scale; of the blocks, and of the pooling.
        image_sizes: the scales, each a side or (height, width), coarse to fine, the last equal to `image_size`;
            None for half the size and the size itself.
        drop_path: stochastic depth, the same in every block.

    ValueError: sizes that don't divide, or scales out of order.
    """

    def __init__(
        self, *, image_size: int | tuple[int, int], patch_size: int, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, image_sizes: Sequence[int | tuple[int, int]] | None = None, channels: int = 3,
        dropout: float = 0.0, attn_drop: float = 0.0, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        sizes = image_sizes or ((height // 2, width // 2), (height, width))
        sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
        for size in sizes:
            if 0 in size or size[0] % patch_size or size[1] % patch_size:
                shown = size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
                raise ValueError(f"image size {shown} is not divisible by patch size {patch_size}")
        if sizes != sorted(set(sizes)) or sizes[-1] != (height, width):
            shown = " ".join(str(h) if h == w else f"{h}x{w}" for h, w in sizes)
            size = height if height == width else f"{height}x{width}"
            raise ValueError(f"image sizes {shown} don't rise to the image size, {size}")
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        if dim % 2:
            raise ValueError(f"dim {dim} is not divisible by 2, as MViT needs")
        self.image_size = (height, width)
        self.image_sizes = sizes
        grids = [(h // patch_size, w // patch_size) for h, w in sizes]
        self.grid = grids[-1]
        self.lengths = [1 + rows * columns for rows, columns in grids]
        self.patch_embed = PatchEmbed(channels, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.temporal_pos_embed = nn.Parameter(rearrange(sincos_1d(len(sizes), dim), "s d -> 1 s 1 d"))
        # A matrix product, unlike F.interpolate, has a deterministic gradient on GPUs.
        for i, grid in enumerate(grids[:-1]):
            self.register_buffer(f"to_grid_{i}", resampling(self.grid, grid), persistent=False)
        self.dropout = dropout
        words = (dim, heads, mlp_dim, self.lengths, dropout, attn_drop, drop_path)
        self.blocks = nn.ModuleList(Block(*words) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn_pool = AttentionPool(dim, heads, mlp_dim, len(sizes), dropout)
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """The published initialisation for training from scratch; what isn't named here keeps the value it has."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.attn_pool.latent, std=self.attn_pool.latent.shape[-1] ** -0.5)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves out."""
        return {"cls_token", "pos_embed", "temporal_pos_embed", "attn_pool.latent"}

    def positions(self, i: int) -> torch.Tensor:
        """Position embedding of scale i, (1, n, d)."""
        finest = i == len(self.image_sizes) - 1
        return self.pos_embed if finest else self.get_buffer(f"to_grid_{i}") @ self.pos_embed

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> class token and patch tokens of each scale, coarse to fine, (b, sum of lengths, d)."""
        if x.shape[-2:] != self.image_size:
            raise ValueError(f"the image is {x.shape[-2]}x{x.shape[-1]}, the model expects {self.image_size}")
        tokens = []
        for i, size in enumerate(self.image_sizes):
            scale = self.temporal_pos_embed[:, i]  # (1, 1, d)
            finest = size == self.image_size
            image = x if finest else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            tokens += [repeat(self.cls_token + scale, "1 1 d -> b 1 d", b=x.shape[0])]
            tokens += [self.patch_embed(image) + (self.positions(i) + scale)]
        return dropout(torch.cat(tokens, dim=1), self.dropout, self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> normalised tokens of all scales, (b, sum of lengths, d)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> logits (b, num_classes), of the finest scale."""
        return self.head(self.attn_pool(self.forward_features(x)[:, -self.lengths[-1] :]))

    @torch.no_grad()
    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """As ViT's, (b, depth, heads, n, n); n is the sum of lengths, coarse to fine; 0 where a token sees nothing."""
        training = self.training
        self.eval()
        x = self.embed(x)
        maps = []
        for block in self.blocks:
            maps.append(block.attn.weights(block.norm1(x)))
            x = block(x)
        self.train(training)
        return torch.stack(maps, dim=1)

    def token_layout(self) -> dict:
        """Where tokens stand in `attention_maps`, their positions and filters; see models/__init__.py."""
        scales, first = [], 0
        for i, (size, length) in enumerate(zip(self.image_sizes, self.lengths, strict=True)):
            rows = self.grid[0] * size[0] // self.image_size[0]
            places = dict(grid=(rows, (length - 1) // rows), first=first, start=first + 1)
            filters = ("patch embedding", self.patch_embed.proj.weight) if size == self.image_size else None  # shared
            scales.append(dict(name=f"{size[1]} px image", positions=self.positions(i)[0], filters=filters, **places))
            first += length
        return dict(class_token=scales[-1]["first"], scales=scales)
