"""What the server was told about its decoder: made once by the config hook, read in every process of the engine."""

from dataclasses import asdict, dataclass
from typing import Any

from serving.options import DecoderOptions, cached_options, request_options

KEY = "setflow"  # in vLLM's --additional-config, the field that is there for plugins


@dataclass(frozen=True)
class Settings:
    """decoder: the spec that requests have by default. block_size: the largest that they may ask for. adapter: folder of a
    gated adapter, or None."""

    decoder: str
    block_size: int
    mask_token_id: int
    adapter: str | None = None

    @property
    def canvas_length(self) -> int:
        """Rows behind the text of any request, at most."""
        return 2 * self.block_size - 1

    def options(self, extra_args: dict[str, Any] | None) -> DecoderOptions:
        """What a request with these ``extra_args`` runs with; raises ValueError for what it cannot have."""
        return request_options(self.decoder, self.block_size, extra_args)

    @property
    def default(self) -> DecoderOptions:
        return cached_options(self.decoder)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def settings_of(vllm_config: Any) -> Settings:
    """What the config hook left in ``vllm_config``."""
    return Settings(**vllm_config.additional_config[KEY])
