"""What the commands of data_prep are made of: readers of official files, and what every builder shares."""
