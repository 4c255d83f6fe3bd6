{{/*
What runs and ends: migrations, and the chart's own clients (batches and tests), which call the services' gRPC APIs.
*/}}

{{/* [root, own values]: `defaults` where they are about where and how a pod runs, and the own values over them. */}}
{{- define "carillon.jobValues" -}}
{{- $shared := pick (index . 0).Values.defaults "podSecurityContext" "securityContext" "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" "schedulerName" "hostAliases" "dnsPolicy" "dnsConfig" -}}
{{- mergeOverwrite (deepCopy $shared) (deepCopy (index . 1)) | toYaml -}}
{{- end }}

{{/* root, values: a Job's limits. Exit code 2 says that settings or arguments are wrong: trying again is no use. */}}
{{- define "carillon.jobLimits" -}}
backoffLimit: {{ .values.backoffLimit }}
activeDeadlineSeconds: {{ .values.activeDeadlineSeconds }}
{{- with .values.ttlSecondsAfterFinished }}
ttlSecondsAfterFinished: {{ . }}
{{- end }}
{{- if semverCompare ">=1.26-0" .root.Capabilities.KubeVersion.Version }}
podFailurePolicy:
  rules:
    - action: FailJob
      onExitCodes: {operator: In, values: [2]}
{{- end }}
{{- end }}

{{/* root, name, values: the settings that `migrate` reads; inline, because at pre-install there is no ConfigMap yet. */}}
{{- define "carillon.migrationEnv" -}}
{{- $config := mergeOverwrite (deepCopy .root.Values.config) (default dict .values.config) -}}
{{- range $setting, $value := $config }}
{{- if or (hasPrefix "CARILLON_POSTGRES_" $setting) (hasPrefix "CARILLON_TELEMETRY_" $setting) }}
- {name: {{ $setting }}, value: {{ include "carillon.text" $value | quote }}}
{{- end }}
{{- end }}
{{- with (include "carillon.givenSecrets" . | fromYaml).postgresUrl }}
- name: {{ .env }}
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}
{{- end }}
{{- end }}

{{/* Where the services are, and as whom to call them. */}}
{{- define "carillon.clientEnv" -}}
{{- range $name := include "carillon.names" . | splitList " " }}
- {name: CARILLON_{{ upper $name }}_ENDPOINT, value: {{ include "carillon.endpoint" (list $ $name) | quote }}}
{{- end }}
- {name: CARILLON_TOKEN_FILE, value: /var/run/secrets/carillon/client/{{ .Values.client.token.key }}}
{{- with .Values.client.tenant }}
- {name: CARILLON_TENANT, value: {{ quote . }}}
{{- end }}
{{- if .Values.tls.enabled }}
- {name: CARILLON_TLS, value: "true"}
{{- with include "carillon.clientCa" . | fromYaml }}
- {name: CARILLON_CA_FILE, value: /etc/carillon/ca/{{ .key }}}
{{- end }}
{{- if .Values.client.certificate.existingSecret }}
- {name: CARILLON_CERT_FILE, value: /etc/carillon/certificate/tls.crt}
- {name: CARILLON_KEY_FILE, value: /etc/carillon/certificate/tls.key}
{{- end }}
{{- end }}
{{- end }}

{{- define "carillon.clientMounts" -}}
- {name: token, mountPath: /var/run/secrets/carillon/client, readOnly: true}
{{- if .Values.tls.enabled }}
{{- if include "carillon.clientCa" . | fromYaml }}
- {name: ca, mountPath: /etc/carillon/ca, readOnly: true}
{{- end }}
{{- if .Values.client.certificate.existingSecret }}
- {name: certificate, mountPath: /etc/carillon/certificate, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "carillon.clientVolumes" -}}
- name: token
{{- if .Values.client.token.existingSecret }}
  {{- include "carillon.oneKey" .Values.client.token | nindent 2 }}
{{- else }}
  projected:
    sources:
      - serviceAccountToken:
          path: {{ .Values.client.token.key }}
          audience: {{ .Values.auth.jwt.audience | quote }}
          expirationSeconds: 3600
{{- end }}
{{- if .Values.tls.enabled }}
{{- with include "carillon.clientCa" . | fromYaml }}
- name: ca
  {{- include "carillon.oneKey" . | nindent 2 }}
{{- end }}
{{- with .Values.client.certificate.existingSecret }}
- name: certificate
  secret:
    secretName: {{ . }}
    items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
{{- end }}
{{- end }}
{{- end }}

{{/* Whom the clients believe: client.ca, else what cert-manager puts beside intake's certificate; else the system's. */}}
{{- define "carillon.clientCa" -}}
{{- $ca := .Values.client.ca -}}
{{- if or $ca.existingSecret $ca.existingConfigMap -}}
{{- toYaml $ca -}}
{{- else if .Values.tls.certManager.enabled -}}
{{- $values := include "carillon.service" (list . "intake") | fromYaml -}}
existingSecret: {{ include "carillon.tlsSecret" (dict "root" . "name" "intake" "values" $values) }}
key: ca.crt
{{- end -}}
{{- end }}

{{/* Whether the clients have a token: from a Secret, or as the service account they are. */}}
{{- define "carillon.hasClientToken" -}}
{{- if or .Values.client.token.existingSecret (and (eq .Values.auth.mode "jwt") .Values.auth.jwt.fromCluster) }}true{{ end -}}
{{- end }}
