"""Pipeline parallelism: schedules as data, a simulator that checks and draws them, one executor that runs them."""
