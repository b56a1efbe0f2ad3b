enable_check_env = True
