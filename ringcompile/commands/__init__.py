"""What ``python -m ringcompile`` can do, one module for each command."""
