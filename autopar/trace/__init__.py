"""From a torch model to an fx graph of ATen operators and its torch-free `OpGraph`."""
