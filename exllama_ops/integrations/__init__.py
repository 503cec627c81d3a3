"""Other libraries' names, signatures and flags: nothing outside this folder and the command line knows them."""
