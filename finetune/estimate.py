"""What a recipe costs before it runs: parameters, GPU memory and hours, computed from its numbers."""

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from decoding.forward.loading import load_config, load_tokenizer
from decoding.inputs.checks import check_count
from decoding.training.objective import RowsPerToken
from decoding.training.packed import HEAD_CHUNK
from finetune.recipe import Recipe, head_size

# bf16 FLOP/s of the tensor cores without sparsity, and bytes of memory; NVIDIA's data sheets (SXM).
GPUS = {"a100": (312e12, 80e9), "h100": (989e12, 80e9), "h200": (989e12, 141e9)}

# The models of the packaged recipes, as in their config.json, so that nothing has to be fetched to judge them.
KNOWN: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Qwen/Qwen3-0.6B": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Estimate:
    """The cost of ``recipe`` on ``gpus`` GPUs. Memory is that of one of them, in bytes.

    With all weights trained, several GPUs share weights, gradients and optimizer (FSDP, ZeRO-3); frozen weights lie on
    each. ``mfu`` is the share of its peak arithmetic that a GPU does.
    """

    recipe: Recipe
    gpu: str = "h100"
    gpus: int = 1
    mfu: float = 0.4

    def __post_init__(self):
        if self.gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {self.gpu!r}")
        check_count("gpus", self.gpus)
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be above 0 and at most 1, got {self.mfu}")

    @cached_property
    def config(self) -> PretrainedConfig:
        recipe = self.recipe
        if recipe.new_model is not None:
            assert recipe.tokenizer is not None
            tokenizer = load_tokenizer(recipe.tokenizer, field="tokenizer")  # by its tokens the embeddings are counted
            return LlamaConfig(**{"vocab_size": len(tokenizer), **recipe.new_model})
        assert recipe.model is not None
        return KNOWN.get(recipe.model) or load_config(recipe.model)

    @cached_property
    def model(self):
        """The model without its weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def trained(self) -> int:
        """Parameters that are trained: all, or the low-rank terms and the vector of the mask token; and a selector's."""
        selector = 3 * self.config.hidden_size * getattr(self.recipe.build_objective(), "selector", 0)
        if self._kind in ("full", "selector"):
            return selector + (self.parameters if self._kind == "full" else 0)
        layers = [m for name, m in self.model.named_modules() if name.rpartition(".")[2] in self.recipe.tuning.targets]
        rows = sum(m.in_features + m.out_features for m in layers)
        return selector + self.recipe.tuning.rank * rows + self.config.hidden_size

    @property
    def weights(self) -> float:
        """float32 where they are trained, with the bf16 copies of autocast; else in the dtype of the forward."""
        if self._kind == "full":
            return self.parameters * (4 + (2 if self._width == 2 else 0)) / self.gpus
        return self.parameters * self._width + 4 * self.trained

    @property
    def gradients_and_optimizer(self) -> float:
        """One float32 for the gradient and two for AdamW's moments."""
        return 12 * self.trained / (self.gpus if self._kind == "full" else 1)

    @property
    def activations(self) -> float:
        config, layers = self.config, self.config.num_hidden_layers
        layer = layer_bytes(config, self._width)
        per_row = layers * config.hidden_size * self._width + layer if self._checkpointed else layers * layer
        keys = 2 * layers * config.num_key_value_heads * head_size(config) * self._width
        return self._micro_batch * (self.rows.trained * per_row + self.rows.constant * keys)

    @property
    def logits(self) -> float:
        """Of one chunk: in the forward's dtype, in float32, their softmax and its gradient; a teacher's, too."""
        count = min(self._micro_batch * self.rows.labelled * self.config.vocab_size, HEAD_CHUNK)
        return count * (self._width + 12) * (2 if self.rows.taught else 1)

    @property
    def memory(self) -> float:
        return self.weights + self.gradients_and_optimizer + self.activations + self.logits

    @cached_property
    def rows(self) -> RowsPerToken:
        """What the objective runs; behind frozen weights no row of the trunk keeps anything for a gradient."""
        rows = self.recipe.build_objective().rows_per_token()
        if self._kind != "selector":
            return rows
        return rows._replace(trained=0.0, constant=rows.constant + rows.trained)

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a training step for each token of text.

        For each weight that a row meets: 2 forward, 2 for the gradient of the row and 2 for that of the weight, which a
        frozen one needs not; a row without gradient costs the first 2 only, and checkpointing runs the forward again.
        Attention: forward 4 * heads * size for each key that a row sees, L / 2 on average, and twice that backward.
        """
        kept, constant, labelled, taught = self.rows
        config, again = self.config, int(self._checkpointed)
        layers = sum(p.numel() for p in self.model.get_decoder().layers.parameters())
        seen = (
            2 * config.num_hidden_layers * config.num_attention_heads * head_size(config) * self.recipe.sequence_length
        )
        passes = 6 if self._kind == "full" else 4
        trunk = kept * ((passes + 2 * again) * layers + (3 + again) * seen) + constant * (2 * layers + seen)
        head = config.hidden_size * config.vocab_size
        return trunk + head * (passes * labelled + 2 * taught)

    @property
    def tokens_per_step(self) -> int:
        return self._micro_batch * self.recipe.training.get("gradient_accumulation_steps", 1) * self.gpus

    @property
    def tokens_per_second(self) -> float:
        return GPUS[self.gpu][0] * self.gpus * self.mfu / self.flops_per_token

    @property
    def hours(self) -> float:
        return self.recipe.training.get("max_steps", 0) * self.tokens_per_step / self.tokens_per_second / 3600

    def lines(self) -> list[str]:
        """For people."""
        parts = ("weights", "gradients_and_optimizer", "activations", "logits")
        memory = ", ".join(f"{part.replace('_', ' ')} {getattr(self, part) / 1e9:.1f}" for part in parts)
        fits = "fits" if self.memory < GPUS[self.gpu][1] else "does not fit"
        where = self.gpu if self.gpus == 1 else f"{self.gpus} x {self.gpu}"
        tokens = self.recipe.training.get("max_steps", 0) * self.tokens_per_step
        return [
            f"parameters: {self.parameters / 1e9:.2f} billion, of which {self.trained / 1e6:.1f} million are trained",
            f"memory of each GPU: {self.memory / 1e9:.0f} GB ({memory}), which {fits} into {self.gpu}",
            f"arithmetic: {self.flops_per_token / 1e9:.1f} GFLOP for each token of text",
            f"time on {where} at {self.mfu:.0%} of peak: {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.hours:.1f} hours for {tokens / 1e6:.0f} million tokens",
        ]

    @property
    def _kind(self) -> str:
        return self.recipe.tuning.kind

    @property
    def _width(self) -> int:
        """Bytes of a number in the forward."""
        return 2 if self.recipe.training.get("bf16") else 4

    @property
    def _micro_batch(self) -> int:
        """Tokens of text that one GPU runs at once."""
        return self.recipe.training.get("per_device_train_batch_size", 8) * self.recipe.sequence_length

    @property
    def _checkpointed(self) -> bool:
        return bool(self.recipe.training.get("gradient_checkpointing"))


def layer_bytes(config: PretrainedConfig, width: int) -> float:
    """What one decoder layer keeps of one row for the gradient, without dropout; ``width`` bytes for a number.

    Norms keep their input in float32, what it becomes, and what goes on; Qwen3's norms of queries and keys the first two.
    Attention keeps queries, keys and values, these two repeated for all heads, and its output, but no mask and no
    matrix of weights (FlexAttention; sdpa adds the mask). SwiGLU keeps its three factors and their product.
    """
    queries, keys = config.num_attention_heads * head_size(config), config.num_key_value_heads * head_size(config)
    norms = 2 * config.hidden_size * (4 + 2 * width)
    if config.model_type == "qwen3":
        norms += (queries + keys) * (4 + width)
    return norms + width * 4 * queries + width * 4 * config.intermediate_size
