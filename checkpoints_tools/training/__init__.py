"""Training of EAGLE heads: answers from the target itself, batched passes, the loss over unrolled drafts, export."""
