"""What decides how a model is compressed and whether that went well; see docs/diagnostics.md."""
