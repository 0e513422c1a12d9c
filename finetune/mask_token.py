"""The mask token of a model that had none: its row in the embedding table."""

import torch


@torch.no_grad()
def initialise_mask_token(model, mask_token_id: int) -> None:
    """Set the mask token's embedding to the mean of all plus a little noise, unless the model already decodes blocks."""
    if getattr(model.generation_config, "trained_block_sizes", None) is None:
        table = model.get_input_embeddings().weight
        table[mask_token_id] = table.mean(0) + 0.1 * table.std(0) * torch.randn_like(table[0])
