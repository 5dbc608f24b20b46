"""Training of EAGLE heads: answers from the target itself, the loss over unrolled drafts, export."""
