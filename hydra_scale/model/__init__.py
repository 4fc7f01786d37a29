"""The encoder: embedding, layers by `layer_pattern`, masked language model head. `build` puts it together.

Shape letters: T tokens of all documents laid end to end, D d_model, M masked positions, V vocabulary.
"""
