"""Hugging Face's own test suite, run against our models. See docs/conformance.md."""
