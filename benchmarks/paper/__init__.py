"""The paper's tables, at three sizes."""
