{{/*
Names, labels and values that more than one template needs.

A service's values are `defaults` with `services.<name>` merged over them; "carillon.service" makes them. Helpers that
render part of a pod take one dict: root (the chart's context), name (the component) and values (its merged values).
*/}}

{{/* The four services, in the order in which a command passes them. */}}
{{- define "carillon.names" -}}
intake scheduler digest dispatcher
{{- end }}

{{/* At most 40 characters, because what belongs to a component has a longer name; cut names stay different. */}}
{{- define "carillon.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- include "carillon.cut" (list (default $full .Values.fullnameOverride) 40) -}}
{{- end }}

{{/* [name, characters]: the name, or its beginning and a hash of the whole. */}}
{{- define "carillon.cut" -}}
{{- $name := index . 0 -}}
{{- $most := int (index . 1) -}}
{{- if gt (len $name) $most -}}
{{- printf "%s-%s" (trunc (int (sub $most 9)) $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end }}

{{/* [root, component]: the name of what belongs to a component. */}}
{{- define "carillon.componentName" -}}
{{- printf "%s-%s" (include "carillon.fullname" (index . 0)) (index . 1) -}}
{{- end }}

{{/* [root, component]: what selects a component's pods. It never changes, because a Deployment's selector cannot. */}}
{{- define "carillon.selectorLabels" -}}
app.kubernetes.io/name: {{ default (index . 0).Chart.Name (index . 0).Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* [root, component] */}}
{{- define "carillon.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "carillon.podLabels" . }}
{{- end }}

{{/* [root, component]: the same without the chart's version, which is no reason to restart anything. */}}
{{- define "carillon.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "carillon.selectorLabels" . }}
app.kubernetes.io/version: {{ default $root.Chart.AppVersion $root.Values.image.tag | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: carillon
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* [root, own annotations…]: those and commonAnnotations, as a block that may be empty. */}}
{{- define "carillon.annotations" -}}
{{- $all := deepCopy (index . 0).Values.commonAnnotations -}}
{{- range rest . }}{{ $all = mergeOverwrite $all (default dict .) }}{{ end -}}
{{- with $all -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A setting's value as text; numbers without an exponent. */}}
{{- define "carillon.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{/* [root, service]: its values, as YAML. */}}
{{- define "carillon.service" -}}
{{- $values := (index . 0).Values -}}
{{- mergeOverwrite (deepCopy $values.defaults) (default dict (index $values.services (index . 1))) | toYaml -}}
{{- end }}

{{- define "carillon.image" -}}
{{- $image := .Values.image -}}
{{- $registry := default $image.registry .Values.global.imageRegistry -}}
{{- with $registry }}{{ . }}/{{ end }}{{ $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .Chart.AppVersion $image.tag }}{{ end -}}
{{- end }}

{{/* root, name, values: the service account of a component's pods. */}}
{{- define "carillon.serviceAccountName" -}}
{{- $account := .values.serviceAccount -}}
{{- if $account.create -}}
{{- default (include "carillon.componentName" (list .root .name)) $account.name -}}
{{- else -}}
{{- default "default" $account.name -}}
{{- end -}}
{{- end }}

{{/* [root, service]: host:port of its gRPC API, as seen from any namespace. */}}
{{- define "carillon.endpoint" -}}
{{- $root := index . 0 -}}
{{- $values := include "carillon.service" . | fromYaml -}}
{{- printf "%s.%s.svc.%s:%v" (include "carillon.componentName" .) $root.Release.Namespace $root.Values.clusterDomain $values.service.port -}}
{{- end }}

{{/* Annotations that have Helm and Argo CD run something before the release; takes [weight]. */}}
{{- define "carillon.hookAnnotations" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ index . 0 | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
argocd.argoproj.io/hook: PreSync
argocd.argoproj.io/hook-delete-policy: BeforeHookCreation
argocd.argoproj.io/sync-wave: {{ index . 0 | quote }}
{{- end }}

{{/* [root, name]: a batch's CronJob. Kubernetes allows 52 characters, and appends the minute of each run. */}}
{{- define "carillon.batchName" -}}
{{- include "carillon.cut" (list (printf "%s-batch-%s" (include "carillon.fullname" (index . 0)) (index . 1)) 52) -}}
{{- end }}

{{/* How many seconds a pod may take to end: preStop, the drain, and time to close what comes after it. */}}
{{- define "carillon.gracePeriod" -}}
{{- $drain := .values.drain -}}
{{- default (add $drain.preStopSeconds $drain.timeoutSeconds 15) .values.terminationGracePeriodSeconds -}}
{{- end }}

{{/* Whether autoscaling of either kind is on: then nobody else may set the number of replicas. */}}
{{- define "carillon.isAutoscaled" -}}
{{- if or .values.autoscaling.hpa.enabled .values.autoscaling.keda.enabled }}true{{ end -}}
{{- end }}
