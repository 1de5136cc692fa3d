"""Base against aligned: scores, win rates with intervals, and the report that shows them."""
