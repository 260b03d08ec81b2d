"""What is computed: one module or package per asset, named like the table that it makes."""
