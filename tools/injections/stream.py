"""Mistakes of the norms, of the residual stream and of the feed-forward."""

import torch

# ---- norms ---------------------------------------------------------------------------------------


def eps(port, value):
    for norm in port.norms:
        norm.variance_epsilon = value


def norm_forward(port, weighted):
    """RMSNorm with weighted(normed float32, weight, dtype) as its last step."""

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weighted(wide * scale, self.weight, x.dtype)

    port.replace(port.code.LlamaRMSNorm, "forward", forward)


def weight_before_cast(normed, weight, dtype):
    return (normed * weight.float()).to(dtype)


def weight_missing(normed, weight, dtype):
    return normed.to(dtype)


def weight_plus_one(normed, weight, dtype):
    return (1 + weight) * normed.to(dtype)


def final_norm_missing(port):
    port.replace(port.model.norm, "forward", lambda x: x)


def residual(port, first, second):
    """first(stream, normed) and second(stream, normed): what a block's two sums start from."""

    def forward(self, hidden_states, **options):
        x = self.input_layernorm(hidden_states)
        mid = first(hidden_states, x) + self.self_attn(hidden_states=x, **options)[0]
        y = self.post_attention_layernorm(mid)
        return second(mid, y) + self.mlp(y)

    port.replace(port.code.LlamaDecoderLayer, "forward", forward)


def stream(stream, normed):
    return stream


def normed(stream, normed):
    return normed


def nothing(stream, normed):
    return 0


def norm_squares_f16(port):
    """RMSNorm without the step to float32: squares beyond 65504 are infinite."""

    def forward(self, x):
        variance = x.half().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance.float() + self.variance_epsilon)).to(x.dtype)

    port.replace(port.code.LlamaRMSNorm, "forward", forward)


# ---- feed-forward --------------------------------------------------------------------------------


def activation(port, function):
    for layer in port.layers:
        layer.mlp.act_fn = function


def gate_up_in_code(port):
    port.replace(
        port.code.LlamaMLP,
        "forward",
        lambda self, x: self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x))),
    )
