"""What every op stands on: custom_vjp, its rules, the backends, launching, argument checks."""
