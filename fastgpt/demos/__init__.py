"""What the tasks can do, each shown by one command on data that it makes itself; nothing is downloaded."""
