"""What stays of a step: records, verdicts, receipts and costs."""
