"""From logits to a token, and from tokens to text.

sampling.py   what a caller says of how tokens are chosen
plan.py       that, over the bundle's generation_config.json, over transformers' defaults: one complete GenerationConfig
penalties.py  what OpenAI's requests do to logits and transformers has no processor for
choose.py     one token after another by it, with transformers' own logits processors
text.py       text that grows with the tokens, from the end of the prompt on
stops.py      texts that end a text
pieces.py     the bytes of one token, for log probabilities
"""
