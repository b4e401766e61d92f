"""From a prompt's words to what SD3 and SDXL take: CLIP and T5 of the `transformers` package, in the client's process.

Ranks never import this, and transformers is imported when the first prompt comes. `files.find` says by headers alone which
encoders lie at some paths, `CheckpointEncoders` encodes with them, and `TextEncoders` is what all that encodes looks like.
"""
