#!/bin/bash
# Makes the databases of Prefect and MLflow, each with an owner of its own that can see no other. The image of PostgreSQL
# runs it once, in an empty cluster; for a server of your own, run it as its superuser with the usual PG variables. It
# lies here because kustomize reads nothing outside its folder.
set -euo pipefail

create() { # NAME, and the variable with its password, which is not shown among the processes
  PASSWORD="${!2:?$2 is not set}" psql -X -q -v ON_ERROR_STOP=1 -v name="$1" \
    --username "${POSTGRES_USER:-${PGUSER:-postgres}}" --dbname postgres <<'SQL'
\getenv password PASSWORD
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
}

create prefect PREFECT_DATABASE_PASSWORD
create mlflow MLFLOW_DATABASE_PASSWORD
