"""What people use a SpanBERT for: one file, one task."""
