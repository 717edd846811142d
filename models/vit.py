"""Vision Transformer (Dosovitskiy et al. 2020, arXiv 2010.11929), and its hybrid with a ResNet stem.

Patches -> linear embedding, class token, learned position embedding -> pre-norm transformer -> class token -> head.
Parameter names follow timm and DeiT, so that their weight files load by name; Google's `.npz` files and
jeonsworld/ViT-pytorch checkpoints are renamed by `utils.weights.load_weights`.

Parameters at 224 px with 10 classes: ViT-B_16 85,806,346; ViT-B_32 87,462,922; ViT-L_16 303,311,882;
ViT-L_32 305,520,650; ViT-H_14 630,777,610; R50-ViT-B_16 97,897,802.

    model = ViT(image_size=32, patch_size=4, num_classes=10, dim=192, depth=12, heads=3, mlp_dim=768)
    logits = model(torch.randn(8, 3, 32, 32))   # (8, 10)
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from models.resnet import ResNetStem


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


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each with GroupNorm (one group) and GELU, in place of most of the patch embedding.

    After 'Early Convolutions Help Transformers See Better' (Xiao et al. 2021, arXiv 2106.14881), with a norm that keeps
    images apart. (b, channels, h, w) -> (b, dim, h / patch_size, w / patch_size); channels double up to dim on the way.
    """

    def __init__(self, channels: int, dim: int, patch_size: int):
        super().__init__()
        self.stride, self.out_channels = patch_size, dim
        layers = []
        for i in reversed(range(patch_size.bit_length() - 1)):
            width = max(1, dim >> i)
            layers += self.stage(channels, width)
            channels = width
        self.layers = nn.Sequential(*layers)

    def stage(self, channels: int, width: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(1, width), nn.GELU()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class FilterMatrix(nn.Conv2d):
    """3x3 convolution without bias, its filters one matrix (out, in * 9), which is what the optimizer Muon takes."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.weight = nn.Parameter(self.weight.detach().flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, rearrange(self.weight, "o (i h w) -> o i h w", h=3, w=3), padding=1)


class ResidualBlock(nn.Module):
    """x + two convolutions, each with BatchNorm; then GELU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.norm1 = FilterMatrix(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = FilterMatrix(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x + self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x))))))


class ResidualStem(ConvStem):
    """The same, but a stage has max-pooling, BatchNorm, GELU and a `ResidualBlock` (as in arXiv 1512.03385)."""

    def stage(self, channels: int, width: int) -> list[nn.Module]:
        pooled = [FilterMatrix(channels, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
        return [*pooled, ResidualBlock(width)]


class PatchEmbed(nn.Module):
    """Image (b, c, h, w) -> tokens (b, n, d): a convolution with kernel = stride = patch, after the stem if any."""

    def __init__(self, channels: int, dim: int, patch_size: int, stem: ResNetStem | ConvStem | None = None):
        super().__init__()
        self.stem = stem or nn.Identity()
        if stem is not None:
            channels, patch_size = stem.out_channels, patch_size // stem.stride
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
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
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, attn_drop: float = 0.0):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Attention after the softmax, (b, heads, n, n)."""
        q, k, _ = self.split_heads(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        q, k, v = self.split_heads(x)
        x = attend(q[:, :, :queries], k, v, self.attn_drop if self.training else 0.0)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


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
    """x + attention(norm(x)), then x + mlp(norm(x)); with `queries`, of the first so many tokens alone."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float, attn_drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        x = x[:, :queries] + drop_path(self.attn(self.norm1(x), queries), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class ViT(nn.Module):
    """Vision Transformer.

    Args:
        image_size, channels: side in pixels, or (height, width), and channels of the input.
        patch_size: side of a patch in pixels; with a stem, of the image region behind a token (a multiple of 16).
        num_classes: size of the head.
        dim, depth, heads, mlp_dim: width, number of blocks, attention heads, hidden width of the MLPs.
        dropout, attn_drop: after the embeddings and both MLP layers; on the attention weights.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first.
        stem_depths, stem_width: of a `ResNetStem`, (3, 4, 9) and 64 in R50; None for plain patches.
        conv_stem, residual_stem: a `ConvStem` or `ResidualStem` before the patch embedding, which is then a 1x1
            convolution; patch_size is a power of 2.
        init: of weights from scratch, 'published' or 'timm'.

    ValueError: sizes that don't divide, two stems, or an unknown `init`.
    """

    def __init__(
        self, *, image_size: int | tuple[int, int], patch_size: int, num_classes: int, dim: int, depth: int,
        heads: int, mlp_dim: int, channels: int = 3, dropout: float = 0.1, attn_drop: float = 0.0,
        drop_path: float = 0.0, stem_depths: tuple[int, int, int] | None = None, stem_width: int = 64,
        conv_stem: bool = False, residual_stem: bool = False, init: str = "published",
    ):  # fmt: skip
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            shown = height if height == width else f"{height}x{width}"
            raise ValueError(f"image size {shown} is not divisible by patch size {patch_size}")
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        if stem_depths and patch_size % ResNetStem.stride:
            raise ValueError(f"patch size {patch_size} is not a multiple of {ResNetStem.stride}, the stem's stride")
        if stem_depths and height * width == ResNetStem.stride**2:
            raise ValueError(f"image size {height} leaves the stem one pixel, too few for its norms")
        if bool(stem_depths) + conv_stem + residual_stem > 1:
            raise ValueError("stem_depths, conv_stem and residual_stem ask for more than one stem")
        if (conv_stem or residual_stem) and (patch_size == 1 or patch_size.bit_count() > 1):
            raise ValueError(f"a conv stem needs patches of 2, 4, 8, ... pixels, not {patch_size}")
        if init not in ("published", "timm"):
            raise ValueError(f"unknown init {init!r}, one of published timm")
        self.image_size = (height, width)
        self.grid = (height // patch_size, width // patch_size)
        stem = ResNetStem(channels, stem_depths, stem_width) if stem_depths else None
        if conv_stem or residual_stem:
            stem = (ConvStem if conv_stem else ResidualStem)(channels, dim, patch_size)
        self.patch_embed = PatchEmbed(channels, dim, patch_size, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        self.dropout = dropout
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim, dropout, attn_drop, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if init == "published":
            self.init_weights()
        else:
            self.init_weights_timm()

    def init_weights(self) -> None:
        """As published, but that class token and positions are 0 there; what isn't named here keeps torch's default."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            for fc in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(fc.weight)
                nn.init.normal_(fc.bias, std=1e-6)

    def init_weights_timm(self) -> None:
        """The initialisation of timm's ViT; what isn't named here keeps torch's default."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves out."""
        return {"cls_token", "pos_embed"}

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> class token and patch tokens with their positions, (b, 1 + n, d)."""
        if x.shape[-2:] != self.image_size:
            raise ValueError(f"the image is {x.shape[-2]}x{x.shape[-1]}, the model expects {self.image_size}")
        cls = repeat(self.cls_token, "1 1 d -> b 1 d", b=x.shape[0])
        return dropout(torch.cat([cls, self.patch_embed(x)], dim=1) + self.pos_embed, self.dropout, self.training)

    def forward_features(self, x: torch.Tensor, tokens: int | None = None) -> torch.Tensor:
        """Image (b, c, h, w) -> normalised tokens (b, 1 + n, d), or the first `tokens` of them."""
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, tokens))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> logits (b, num_classes)."""
        return self.head(self.forward_features(x, tokens=1)[:, 0])  # all that the head reads: 6 % less of 12 blocks

    @torch.no_grad()
    def attention_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Image (b, c, h, w) -> attention of every block and head after softmax, (b, depth, heads, 1 + n, 1 + n).

        Always in evaluation mode, so that looking changes no statistics.
        """
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
        first = next(module for module in self.patch_embed.modules() if isinstance(module, nn.Conv2d))
        name = "patch embedding" if first is self.patch_embed.proj else "patch embedding, first convolution"
        filters = name, first.weight.view(first.out_channels, first.in_channels, *first.kernel_size)
        positions = self.pos_embed[0, 1:]
        patches = dict(name="patches", grid=self.grid, first=0, start=1, positions=positions, filters=filters)
        return dict(class_token=0, scales=[patches])
