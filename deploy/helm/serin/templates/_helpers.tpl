{{- define "serin.fullname" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) -}}
{{- $name = printf "%s-%s" $name .Chart.Name -}}
{{- end -}}
{{- .Values.fullnameOverride | default $name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "serin.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "serin.labels" -}}
{{ include "serin.selectorLabels" . }}
{{ include "serin.commonLabels" . }}
{{- end }}

{{- /* What objects have that are no part of what the selector of pods means. */ -}}
{{- define "serin.commonLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- /* Not the selector's: the Service would send requests to the pod, and the NetworkPolicy would hold for it. */ -}}
{{- define "serin.testLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "serin.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "serin.serviceAccountName" -}}
{{- $default := ternary (include "serin.fullname" .) "default" .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default $default -}}
{{- end }}

{{- define "serin.configMap" -}}
{{- .Values.config.existingConfigMap | default (printf "%s-config" (include "serin.fullname" .)) -}}
{{- end }}

{{- /* Empty without lists. */ -}}
{{- define "serin.listsConfigMap" -}}
{{- if .Values.lists.existingConfigMap -}}
{{- .Values.lists.existingConfigMap -}}
{{- else if .Values.lists.files -}}
{{- include "serin.fullname" . }}-lists
{{- end -}}
{{- end }}
