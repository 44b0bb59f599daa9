"""What ``doctor`` looks at: one small function a check, each called with a ``Case`` and giving ``Finding``s."""
