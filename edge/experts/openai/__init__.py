"""What OpenAI's clients send and expect, as values.

fields.py     every field of a request: honoured, without effect, or refused by name
messages.py   a conversation
answer.py     answers and their pieces, with log probabilities
"""
