{{/*
What the pods of services, migrations, batches and tests have in common, and the services' settings.
*/}}

{{/* root, name, values: what every pod has before its containers. */}}
{{- define "carillon.podBasics" -}}
{{- $root := .root -}}
{{- $values := .values -}}
serviceAccountName: {{ include "carillon.serviceAccountName" . }}
automountServiceAccountToken: {{ $values.serviceAccount.automount }}
{{- /* A Service called carillon-grpc would otherwise set CARILLON_GRPC_PORT=tcp://…, which start-up refuses. */}}
enableServiceLinks: false
{{- with concat $root.Values.global.imagePullSecrets $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ if kindIs "string" . }}{{ . }}{{ else }}{{ .name }}{{ end }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml $values.podSecurityContext | nindent 2 }}
{{- range $field := list "priorityClassName" "runtimeClassName" "schedulerName" "nodeSelector" "tolerations" "affinity" "hostAliases" "dnsPolicy" "dnsConfig" }}
{{- with get $values $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $own := dict "labelSelector" (dict "matchLabels" (include "carillon.selectorLabels" (list $root $.name) | fromYaml)) }}
  - {{ toYaml (merge (deepCopy .) (ternary dict $own (hasKey . "labelSelector"))) | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- end }}

{{/* root, values: what every container of ours has. */}}
{{- define "carillon.containerBasics" -}}
image: {{ include "carillon.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- toYaml .values.securityContext | nindent 2 }}
{{- with .values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
Every setting that is a secret or a file: `env` is set from the Secret's key; `file` names the variable that gets the
path where the key is mounted. `only` names the one service that has it.
*/}}
{{- define "carillon.secretSettings" -}}
postgresUrl: {env: CARILLON_POSTGRES_URL}
natsUser: {env: CARILLON_NATS_USER}
natsPassword: {env: CARILLON_NATS_PASSWORD}
natsToken: {env: CARILLON_NATS_TOKEN}
natsCreds: {file: CARILLON_NATS_CREDS_FILE}
natsCa: {file: CARILLON_NATS_TLS_CA_FILE}
natsCert: {file: CARILLON_NATS_TLS_CERT_FILE}
natsKey: {file: CARILLON_NATS_TLS_KEY_FILE}
authTokens: {file: CARILLON_AUTH_TOKENS_FILE}
authJwks: {file: CARILLON_AUTH_JWKS_FILE}
authJwksCa: {file: CARILLON_AUTH_JWKS_CA_FILE}
conditionToken: {env: CARILLON_SCHEDULER_CONDITION_TOKEN, only: scheduler}
formattingToken: {env: CARILLON_DIGEST_FORMATTING_TOKEN, only: digest}
smtpPassword: {file: CARILLON_DISPATCHER_SMTP_PASSWORD_FILE, only: dispatcher}
smtpCa: {file: CARILLON_DISPATCHER_SMTP_CA_FILE, only: dispatcher}
webhookSecrets: {file: CARILLON_DISPATCHER_WEBHOOK_SECRET_FILE, only: dispatcher}
webhookCa: {file: CARILLON_DISPATCHER_WEBHOOK_CA_FILE, only: dispatcher}
unsubscribeSecrets: {file: CARILLON_DISPATCHER_UNSUBSCRIBE_SECRET_FILE, only: dispatcher}
{{- end }}

{{/* root, name, values: the secret settings that this service is given, as YAML: name → {existingSecret, key, env|file}. */}}
{{- define "carillon.givenSecrets" -}}
{{- $given := mergeOverwrite (deepCopy .root.Values.secrets) (default dict .values.secrets) -}}
{{- $found := dict -}}
{{- range $setting, $how := include "carillon.secretSettings" . | fromYaml -}}
{{- $ref := default dict (get $given $setting) -}}
{{- if and (or $ref.existingSecret $ref.existingConfigMap) (or (not $how.only) (eq $how.only $.name)) -}}
{{- $_ := set $found $setting (merge $ref $how) -}}
{{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end }}

{{/* root, name, values: environment entries for the secrets that this service is given. */}}
{{- define "carillon.secretEnv" -}}
{{- range $setting, $ref := include "carillon.givenSecrets" . | fromYaml }}
{{- if $ref.env }}
- name: {{ $ref.env }}
  valueFrom:
    secretKeyRef:
      name: {{ $ref.existingSecret }}
      key: {{ $ref.key }}
{{- else }}
- name: {{ $ref.file }}
  value: /etc/carillon/{{ kebabcase $setting }}/{{ $ref.key }}
{{- end }}
{{- end }}
{{- end }}

{{- define "carillon.secretMounts" -}}
{{- range $setting, $ref := include "carillon.givenSecrets" . | fromYaml }}
{{- if $ref.file }}
- name: {{ kebabcase $setting }}
  mountPath: /etc/carillon/{{ kebabcase $setting }}
  readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{/* Whole directories and no subPath, so that what is replaced in the Secret arrives: services read most files again. */}}
{{- define "carillon.secretVolumes" -}}
{{- range $setting, $ref := include "carillon.givenSecrets" . | fromYaml }}
{{- if $ref.file }}
- name: {{ kebabcase $setting }}
  {{- include "carillon.oneKey" $ref | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* {existingSecret or existingConfigMap, key}: a volume's source with that key alone. */}}
{{- define "carillon.oneKey" -}}
{{- if .existingSecret -}}
secret:
  secretName: {{ .existingSecret }}
  items: [{key: {{ .key | quote }}, path: {{ .key | quote }}}]
{{- else -}}
configMap:
  name: {{ .existingConfigMap }}
  items: [{key: {{ .key | quote }}, path: {{ .key | quote }}}]
{{- end -}}
{{- end }}

{{/* root, name, values: the plain settings of a service, as YAML. What the chart decides itself cannot be in `config`. */}}
{{- define "carillon.config" -}}
{{- $root := .root -}}
{{- $values := .values -}}
{{- $drain := $values.drain -}}
{{- $config := dict
  "CARILLON_SHARDS" $root.Values.shards
  "CARILLON_GRPC_HOST" $root.Values.listenAddress
  "CARILLON_GRPC_PORT" $root.Values.ports.grpc
  "CARILLON_HTTP_HOST" $root.Values.listenAddress
  "CARILLON_HTTP_PORT" $root.Values.ports.http
  "CARILLON_GRPC_DRAIN_DELAY" (printf "%vs" $drain.delaySeconds)
  "CARILLON_GRPC_DRAIN_TIMEOUT" (printf "%vs" $drain.timeoutSeconds)
  "CARILLON_AUTH_MODE" $root.Values.auth.mode -}}
{{- if eq $root.Values.auth.mode "jwt" -}}
{{- $jwt := $root.Values.auth.jwt -}}
{{- $_ := merge $config (dict "CARILLON_AUTH_JWT_ISSUER" $jwt.issuer "CARILLON_AUTH_JWT_AUDIENCE" $jwt.audience) -}}
{{- with $jwt.jwksUrl -}}{{- $_ := set $config "CARILLON_AUTH_JWKS_URL" . -}}{{- end -}}
{{- if $jwt.fromCluster -}}
{{- $_ := merge $config (dict
  "CARILLON_AUTH_JWKS_URL" "https://kubernetes.default.svc/openid/v1/jwks"
  "CARILLON_AUTH_JWKS_CA_FILE" "/var/run/secrets/carillon/cluster/ca.crt"
  "CARILLON_AUTH_JWKS_TOKEN_FILE" "/var/run/secrets/carillon/cluster/token") -}}
{{- end -}}
{{- end -}}
{{- if $root.Values.tls.enabled -}}
{{- $_ := merge $config (dict
  "CARILLON_GRPC_TLS_CERT_FILE" "/etc/carillon/tls/tls.crt"
  "CARILLON_GRPC_TLS_KEY_FILE" "/etc/carillon/tls/tls.key") -}}
{{- if or $root.Values.tls.clientCa.existingSecret $root.Values.tls.clientCa.existingConfigMap -}}
{{- $_ := set $config "CARILLON_GRPC_TLS_CLIENT_CA_FILE" (printf "/etc/carillon/client-ca/%s" $root.Values.tls.clientCa.key) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .name "dispatcher") $root.Values.unsubscribe.baseUrl -}}
{{- $_ := merge $config (dict
  "CARILLON_DISPATCHER_UNSUBSCRIBE_BASE_URL" $root.Values.unsubscribe.baseUrl
  "CARILLON_DISPATCHER_UNSUBSCRIBE_HOST" $root.Values.listenAddress
  "CARILLON_DISPATCHER_UNSUBSCRIBE_PORT" $root.Values.ports.unsubscribe) -}}
{{- end -}}
{{- $derived := dict -}}
{{- if eq .name "dispatcher" -}}
{{- /* What it is sending gets what is left of the drain once calls have ended, which takes a moment. */ -}}
{{- $_ := set $derived "CARILLON_DISPATCHER_DRAIN_TIMEOUT" (printf "%vs" (max 1 (sub $drain.timeoutSeconds (add $drain.delaySeconds 2)))) -}}
{{- end -}}
{{- range $setting, $value := mergeOverwrite $derived $root.Values.config (default dict $values.config) $config }}
{{ $setting }}: {{ include "carillon.text" $value | quote }}
{{- end }}
{{- end }}

{{/* Volumes of a service's pod beside the user's own. */}}
{{- define "carillon.serviceVolumes" -}}
{{- $root := .root -}}
- name: tmp
  emptyDir:
    {{- toYaml .values.tmp | nindent 4 }}
{{- if and (eq $root.Values.auth.mode "jwt") $root.Values.auth.jwt.fromCluster }}
- name: cluster
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- if $root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "carillon.tlsSecret" . }}
    items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
{{- with $root.Values.tls.clientCa }}
{{- if or .existingSecret .existingConfigMap }}
- name: client-ca
  {{- include "carillon.oneKey" . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}
{{- include "carillon.secretVolumes" . }}
{{- end }}

{{- define "carillon.serviceMounts" -}}
{{- $root := .root -}}
- name: tmp
  mountPath: /tmp
{{- if and (eq $root.Values.auth.mode "jwt") $root.Values.auth.jwt.fromCluster }}
- name: cluster
  mountPath: /var/run/secrets/carillon/cluster
  readOnly: true
{{- end }}
{{- if $root.Values.tls.enabled }}
- name: tls
  mountPath: /etc/carillon/tls
  readOnly: true
{{- if or $root.Values.tls.clientCa.existingSecret $root.Values.tls.clientCa.existingConfigMap }}
- name: client-ca
  mountPath: /etc/carillon/client-ca
  readOnly: true
{{- end }}
{{- end }}
{{- include "carillon.secretMounts" . }}
{{- end }}

{{/* root, name, values: the Secret with a service's certificate. */}}
{{- define "carillon.tlsSecret" -}}
{{- $tls := .root.Values.tls -}}
{{- $own := printf "%s-tls" (include "carillon.componentName" (list .root .name)) -}}
{{- default (ternary $own $tls.existingSecret $tls.certManager.enabled) .values.tls.existingSecret -}}
{{- end }}

{{/* root, values: what happens around a container's end. */}}
{{- define "carillon.lifecycle" -}}
{{- if .values.lifecycle -}}
{{- toYaml .values.lifecycle -}}
{{- else if .values.drain.preStopSeconds -}}
{{- /* Until those who route calls here have heard that the pod is leaving, it should not even begin to drain. */ -}}
preStop:
  exec:
    command: [sleep, {{ .values.drain.preStopSeconds | toString | quote }}]
{{- end -}}
{{- end }}
