{{/*
What a schema cannot say: values that only make sense together. Everything wrong is named at once.
*/}}
{{- define "carillon.validate" -}}
{{- $wrong := list -}}
{{- $values := .Values -}}
{{- if and $values.image.digest (contains "@" $values.image.repository) -}}
{{- $wrong = append $wrong "image.repository must not have a digest: that is image.digest" -}}
{{- end -}}
{{- range $name := include "carillon.names" . | splitList " " -}}
{{- $service := include "carillon.service" (list $ $name) | fromYaml -}}
{{- $ctx := dict "root" $ "name" $name "values" $service -}}
{{- $secrets := include "carillon.givenSecrets" $ctx | fromYaml -}}
{{- if not $secrets.postgresUrl -}}
{{- $wrong = append $wrong (printf "%s: secrets.postgresUrl.existingSecret must name a Secret with the key %s, the URL of its database" $name $values.secrets.postgresUrl.key) -}}
{{- end -}}
{{- if and (eq $values.auth.mode "tokens") (not $secrets.authTokens) -}}
{{- $wrong = append $wrong (printf "%s: auth.mode tokens needs secrets.authTokens.existingSecret" $name) -}}
{{- end -}}
{{- $keys := compact (list (ternary "fromCluster" "" $values.auth.jwt.fromCluster) $values.auth.jwt.jwksUrl (dig "authJwks" "file" "" $secrets)) -}}
{{- if and (eq $values.auth.mode "jwt") (ne (len $keys) 1) -}}
{{- /* With two of them, the pod's own token might be sent to somebody else's server. */ -}}
{{- $wrong = append $wrong (printf "%s: auth.mode jwt needs one of auth.jwt.fromCluster, auth.jwt.jwksUrl and secrets.authJwks, and no more" $name) -}}
{{- end -}}
{{- if and $values.tls.enabled (not (include "carillon.tlsSecret" $ctx)) -}}
{{- $wrong = append $wrong (printf "%s: tls.enabled needs tls.existingSecret or tls.certManager.enabled" $name) -}}
{{- end -}}
{{- if and $service.autoscaling.hpa.enabled $service.autoscaling.keda.enabled -}}
{{- $wrong = append $wrong (printf "%s: autoscaling.hpa and autoscaling.keda exclude each other" $name) -}}
{{- end -}}
{{- if and $service.autoscaling.keda.enabled (not $service.autoscaling.keda.prometheus.serverAddress) -}}
{{- $wrong = append $wrong (printf "%s: autoscaling.keda.prometheus.serverAddress must say where Prometheus is" $name) -}}
{{- end -}}
{{- if ge (int $service.drain.delaySeconds) (int $service.drain.timeoutSeconds) -}}
{{- $wrong = append $wrong (printf "%s: drain.delaySeconds is part of drain.timeoutSeconds and must be below it" $name) -}}
{{- end -}}
{{- if le (int (include "carillon.gracePeriod" $ctx)) (int (add $service.drain.preStopSeconds $service.drain.timeoutSeconds)) -}}
{{- $wrong = append $wrong (printf "%s: terminationGracePeriodSeconds must be above drain.preStopSeconds + drain.timeoutSeconds, or what is under way is killed" $name) -}}
{{- end -}}
{{- if gt (int $service.autoscaling.minReplicas) (int $service.autoscaling.maxReplicas) -}}
{{- $wrong = append $wrong (printf "%s: autoscaling.minReplicas must not be above autoscaling.maxReplicas" $name) -}}
{{- end -}}
{{- $least := ternary $service.autoscaling.minReplicas $service.replicas (eq "true" (include "carillon.isAutoscaled" $ctx)) -}}
{{- if and $service.pdb.enabled $least (lt (int (include "carillon.evictable" (list $service.pdb $least))) 1) -}}
{{- $wrong = append $wrong (printf "%s: pdb lets none of %v replicas leave, so that nodes could never be drained" $name $least) -}}
{{- end -}}
{{- $most := ternary $service.autoscaling.maxReplicas $service.replicas (eq "true" (include "carillon.isAutoscaled" $ctx)) -}}
{{- if and (eq $name "scheduler") (gt (int $most) (int $values.shards)) -}}
{{- $wrong = append $wrong (printf "scheduler: %v replicas, but only %v shards: the others would have nothing to do" $most $values.shards) -}}
{{- end -}}
{{- end -}}
{{- if and $values.unsubscribe.baseUrl (not $values.secrets.unsubscribeSecrets.existingSecret) -}}
{{- $wrong = append $wrong "unsubscribe.baseUrl needs secrets.unsubscribeSecrets.existingSecret, with the keys that sign tokens" -}}
{{- end -}}
{{- if and $values.batches (not (include "carillon.hasClientToken" .)) -}}
{{- $wrong = append $wrong "batches need a token to call intake with: client.token.existingSecret" -}}
{{- end -}}
{{- if and $values.tls.enabled (or $values.tls.clientCa.existingSecret $values.tls.clientCa.existingConfigMap) (not $values.client.certificate.existingSecret) (or $values.batches (and $values.tests.enabled (include "carillon.hasClientToken" .))) -}}
{{- $wrong = append $wrong "tls.clientCa refuses callers without a certificate: batches and tests need client.certificate.existingSecret (tests.enabled false: none)" -}}
{{- end -}}
{{- range $name, $of := include "carillon.madeAccounts" . | fromYaml -}}
{{- if gt (len $of) 1 -}}
{{- /* Two objects of one name; and the hook of migrations would delete it for all. */ -}}
{{- $wrong = append $wrong (printf "serviceAccount.name %s would be made for %s: make a shared account yourself, and set serviceAccount.create to false" $name (join ", " $of)) -}}
{{- end -}}
{{- end -}}
{{- $alerts := list -}}
{{- range (.Files.Get "files/alerts.yaml" | fromYaml).groups -}}{{- range .rules -}}{{- $alerts = append $alerts .alert -}}{{- end -}}{{- end -}}
{{- range $values.monitoring.prometheusRule.disabled -}}
{{- if not (has . $alerts) -}}
{{- $wrong = append $wrong (printf "monitoring.prometheusRule.disabled: there is no alert %s" .) -}}
{{- end -}}
{{- end -}}
{{- if lt (len (uniq (list $values.ports.grpc $values.ports.http $values.ports.unsubscribe))) 3 -}}
{{- $wrong = append $wrong "ports: grpc, http and unsubscribe must be three different ones" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- $wrong = append $wrong "ingress.enabled needs ingress.hosts" -}}
{{- end -}}
{{- if and $values.grpcRoute.enabled (not $values.grpcRoute.parentRefs) -}}
{{- $wrong = append $wrong "grpcRoute.enabled needs grpcRoute.parentRefs" -}}
{{- end -}}
{{- $batches := list -}}
{{- range $values.batches -}}{{- $batches = append $batches .name -}}{{- end -}}
{{- if ne (len $batches) (len (uniq $batches)) -}}
{{- $wrong = append $wrong "batches: each name may be there once" -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "the values do not fit together:\n  - %s" (join "\n  - " $wrong)) -}}
{{- end -}}
{{- end }}

{{/* The service accounts that the chart makes, as YAML: name → for whom. */}}
{{- define "carillon.madeAccounts" -}}
{{- $components := dict "client" .Values.client -}}
{{- if .Values.migrations.enabled }}{{ $_ := set $components "migrations" .Values.migrations }}{{ end -}}
{{- range $name := include "carillon.names" . | splitList " " -}}
{{- $_ := set $components $name (include "carillon.service" (list $ $name) | fromYaml) -}}
{{- end -}}
{{- $made := dict -}}
{{- range $name, $values := $components -}}
{{- if $values.serviceAccount.create -}}
{{- $account := include "carillon.serviceAccountName" (dict "root" $ "name" $name "values" $values) -}}
{{- $_ := set $made $account (append (default list (get $made $account)) $name) -}}
{{- end -}}
{{- end -}}
{{- toYaml $made -}}
{{- end }}

{{/* [pdb, replicas]: how many of them may leave at once. Kubernetes rounds percentages up. */}}
{{- define "carillon.evictable" -}}
{{- $pdb := index . 0 -}}
{{- $replicas := int (index . 1) -}}
{{- $given := hasKey $pdb "minAvailable" | ternary $pdb.minAvailable $pdb.maxUnavailable | toString -}}
{{- $pods := int (trimSuffix "%" $given) -}}
{{- if hasSuffix "%" $given -}}{{- $pods = div (add (mul $pods $replicas) 99) 100 -}}{{- end -}}
{{- hasKey $pdb "minAvailable" | ternary (sub $replicas $pods) $pods -}}
{{- end }}
