"""Lossless self-speculation: where drafts come from, how many are verified, and the decoder that does both in a forward."""
