-- For psql -v customer=user_7, after a customer has come from another database: the sequences outside of its schema that
-- its tables take their ids from, as clones do from the template's, must not give out ids that it has already.
SELECT format(
           'SELECT %L AS sequence, setval(%1$L, max(%2$I)::bigint) FROM %3$s HAVING max(%2$I) >= (SELECT last_value FROM %1$s)',
           sequence.oid::regclass, attribute.attname, holder.oid::regclass)
  FROM pg_catalog.pg_class AS holder
  JOIN pg_catalog.pg_attrdef AS given ON given.adrelid = holder.oid
  JOIN pg_catalog.pg_attribute AS attribute ON attribute.attrelid = holder.oid AND attribute.attnum = given.adnum
  JOIN pg_catalog.pg_depend AS depend ON depend.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass
                                     AND depend.objid = given.oid
                                     AND depend.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
  JOIN pg_catalog.pg_class AS sequence ON sequence.oid = depend.refobjid AND sequence.relkind = 'S'
 WHERE holder.relnamespace = (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = :'customer')
   AND holder.relkind IN ('r', 'p') AND sequence.relnamespace <> holder.relnamespace
\gexec
