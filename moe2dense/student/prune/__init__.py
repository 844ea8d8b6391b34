"""Choose layers, channels and heads that go where narrower FFNs are not enough, and cut them out."""
